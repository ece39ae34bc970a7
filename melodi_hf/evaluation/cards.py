"""A model card from the results of a run: the template filled in, each number generated."""

import json
import re
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import AutoConfig, PreTrainedConfig

import melodi_hf  # noqa: F401  AutoConfig knows our models from now on
from melodi_hf.evaluation.systems import read_systems
from melodi_hf.evaluation.tables import (
    Evaluation,
    Results,
    evaluation_table,
    format_cell,
    markdown_table,
    memory_table,
    percent,
    position_table,
)

TEMPLATE = Path(__file__).parents[2] / "model_cards" / "template.md"
LIBRARY = "Python's standard library"
PLOT = "perplexity_by_position.png"  # what a run calls its plot
EMPTY_SECTION = re.compile(r"^## [^\n]+\n\s*(?=^## |\Z)", re.MULTILINE)

CITATIONS = {
    "melodi": """
@inproceedings{chen2025melodi,
  title = {{MELODI}: Exploring Memory Compression for Long Contexts},
  author = {Chen, Yinpeng and Hutchins, DeLesley and Jansen, Aren and Zhmoginov, Andrey and
            Racz, David and Andersen, Jesper},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  url = {https://arxiv.org/abs/2410.03156}
}""",
    "transformer_xl": """
@inproceedings{dai2019transformer,
  title = {{Transformer-XL}: Attentive Language Models beyond a Fixed-Length Context},
  author = {Dai, Zihang and Yang, Zhilin and Yang, Yiming and Carbonell, Jaime and Le, Quoc V. and
            Salakhutdinov, Ruslan},
  booktitle = {Annual Meeting of the Association for Computational Linguistics},
  year = {2019},
  url = {https://arxiv.org/abs/1901.02860}
}""",
    "plain_transformer": """
@inproceedings{vaswani2017attention,
  title = {Attention Is All You Need},
  author = {Vaswani, Ashish and Shazeer, Noam and Parmar, Niki and Uszkoreit, Jakob and
            Jones, Llion and Gomez, Aidan N. and Kaiser, Lukasz and Polosukhin, Illia},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2017},
  url = {https://arxiv.org/abs/1706.03762}
}""",
    "compressive_transformer": """
@inproceedings{rae2020compressive,
  title = {Compressive Transformers for Long-Range Sequence Modelling},
  author = {Rae, Jack W. and Potapenko, Anna and Jayakumar, Siddhant M. and Hillier, Chloe and
            Lillicrap, Timothy P.},
  booktitle = {International Conference on Learning Representations},
  year = {2020},
  url = {https://arxiv.org/abs/1911.05507}
}""",
    "block_recurrent": """
@inproceedings{hutchins2022block,
  title = {Block-Recurrent Transformers},
  author = {Hutchins, DeLesley and Schlag, Imanol and Wu, Yuhuai and Dyer, Ethan and
            Neyshabur, Behnam},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022},
  url = {https://arxiv.org/abs/2203.07852}
}""",
    "elastic_memory": """
@misc{song2026compressive,
  title = {Towards Compressive and Scalable Recurrent Memory},
  author = {Song, Yunchong and Kai, Jushi and Lu, Liming and Qiu, Kaixi and Lin, Zhouhan},
  year = {2026},
  url = {https://arxiv.org/abs/2602.11212}
}""",
    "memorizing_transformer": """
@inproceedings{wu2022memorizing,
  title = {Memorizing Transformers},
  author = {Wu, Yuhuai and Rabe, Markus N. and Hutchins, DeLesley and Szegedy, Christian},
  booktitle = {International Conference on Learning Representations},
  year = {2022},
  url = {https://arxiv.org/abs/2203.08913}
}""",
}

SNIPPET = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{name}"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
text = tokenizer.eos_token + "A document of any length. " * 200  # eos begins every document
ids = tokenizer(text, return_tensors="pt").input_ids
with torch.no_grad():
    first = model(ids[:, :-1])  # a document of any length, in pieces of any length
    memory = first.cache  # all that is kept of it
    mask = torch.ones_like(ids)  # of the whole length: the ids below go on from the memory
    output = model.generate(
        ids[:, -1:], attention_mask=mask, cache=memory, max_new_tokens=20
    )
print(tokenizer.decode(output[0]))"""

CARRYING = """\
A call without `cache` begins a document with an empty memory; a call with those of the
call before goes on where that one ended. The memory is changed in place and does not grow."""


def write_card(
    run_dir: str | Path,
    results: Results | None,
    *,
    template: str | Path = TEMPLATE,
    repo_id: str | None = None,
    license: str = "apache-2.0",
) -> Path:
    """Write the card of the model in `run_dir`, named after its place on the Hub if it has one.

    Without results it says what the model is, and nothing of how it was trained or how good it is.
    """
    run_dir = Path(run_dir)
    config = AutoConfig.from_pretrained(run_dir)
    system = read_systems()[config.model_type]
    title, trained = system.name, ""
    if results is not None:
        corpus = describe_corpus(results)
        title = f"{title}, {describe_size(results['parameters'])}, {corpus}"
        trained = f" trained on {corpus}"
    fields = {
        "front_matter": front_matter(results, title, license),
        "title": title,
        "summary": f"A language model{trained}: it reads a document of any length in windows of "
        f"{config.window_length} tokens, in constant memory. "
        f"From window to window it carries {system.carries}.",
        "snippet": SNIPPET.format(name=repo_id or shown(run_dir)),
        "carrying": CARRYING,
        "memory": describe_memory(config),
        "evaluation": "",  # a section of which nothing is told is left out
        "limits": "",
        "training": "",
        "data": f"Weights and code: {license}.",
        "citation": f"```bibtex{CITATIONS[config.model_type]}\n```",
    }
    if results is not None:
        fields["evaluation"] = describe_evaluation(results, run_dir)
        fields["limits"] = describe_limits(results)
        fields["training"] = describe_training(results)
        fields["data"] += f" {describe_rights(results)}"
    text = Template(Path(template).read_text(encoding="utf-8")).substitute(fields)
    path = run_dir / "README.md"
    path.write_text(EMPTY_SECTION.sub("", text), encoding="utf-8")
    return path


def front_matter(results: Results | None, title: str, license: str) -> str:
    """The card's metadata."""
    card = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["long-context", "memory"],
        model_name=title,
        **({} if results is None else front_matter_of_run(results)),
    )
    return card.to_yaml()


def front_matter_of_run(results: Results) -> dict[str, Any]:
    """What was trained on, and the measured perplexities as the Hub understands them."""
    data, corpus = results["recipe"]["data"], describe_corpus(results)
    measured = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data["source"],
            dataset_name=f"{corpus}, memory {name}",
            dataset_config=name,  # results of one dataset and configuration would be merged
            metric_type="perplexity",
            metric_name="perplexity per token",
            metric_value=round(setting["perplexity_per_token"], 4),
        )
        for name, setting in results["evaluation"]["settings"].items()
    ]
    return {
        "language": ["en", "code"] if data["source"] == "standard_library" else ["en"],
        "datasets": [data["source"]] if "/" in data["source"] else None,
        "metrics": ["perplexity"],
        "eval_results": measured,
    }


def describe_corpus(results: Results) -> str:
    """What was trained on, in a few words."""
    data = results["recipe"]["data"]
    if data["source"] == "files":
        return ", ".join(Path(file).name.split(".")[0] for file in data["files"])
    return LIBRARY if data["source"] == "standard_library" else data["source"]


def describe_size(parameters: int) -> str:
    """142K parameters, 3.46M parameters, 1.2B parameters."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= size:
            return f"{parameters / size:.3g}{letter} parameters"
    return f"{parameters} parameters"


def shown(run_dir: Path) -> str:
    """The folder as seen from here; its name alone if it lies elsewhere."""
    folder, here = run_dir.resolve(), Path.cwd()
    return folder.relative_to(here).as_posix() if folder.is_relative_to(here) else folder.name


def describe_memory(config: PreTrainedConfig) -> str:
    """One row per kind of memory: how far it reaches and how much it holds."""
    total = config.memory_floats()
    rows = [(kind, reach, floats, 2 * floats) for kind, reach, floats in memory_kinds(config)]
    if len(rows) > 1:
        rows.append(("together", "", total, 2 * total))
    assert sum(row[2] for row in rows[: -1 if len(rows) > 1 else None]) == total
    headers = ["memory", "reaches", "numbers per document", "bytes in bfloat16"]
    return (
        f"{markdown_table(headers, rows)}\n\n"
        f"Within a window of {config.window_length} tokens everything is attended to; of what came "
        "before only this is kept, however long the document is."
    )


def memory_kinds(config: PreTrainedConfig) -> list[tuple[str, str, int]]:
    """Name, reach and size of each memory that the configuration asks for."""
    total = config.memory_floats()
    if config.model_type == "compressive_transformer":
        slots, held = config.slots_carried, config.tokens_carried
        floats = config.num_hidden_layers * slots * config.hidden_size
        reach = f"the {slots * config.compression_rate:,} tokens before; then dropped"
        return [
            ("hidden states", f"{held:,} tokens, exactly", total - floats),
            (f"compressed, {slots} slots per layer", reach, floats),
        ]
    exact = f"{config.window_length:,} tokens, exactly"
    if config.model_type == "block_recurrent":
        vectors, layers = config.num_state_vectors, len(config.recurrent_layers)
        state = layers * vectors * config.hidden_size
        reach = "no fixed end: each window moves it on, and what it held fades"
        name = f"state, {vectors} vectors in {layers} of {config.num_hidden_layers} layers"
        kinds = [("keys and values", exact, total - state), (name, reach, state)]
        return kinds if layers else kinds[:1]
    if config.model_type == "memorizing_transformer":
        remembered = 2 * config.memory_length * config.num_attention_heads * config.head_dim
        memory = ("remembered keys and values", f"{config.memory_length:,} tokens", remembered)
        return [("keys and values", exact, total - remembered), memory]
    if config.model_type != "melodi":
        system = read_systems()[config.model_type]
        return [(system.memory, system.reaches.format(config=config), total)]
    short = config.num_short_memory_tokens * config.num_hidden_layers * config.hidden_size
    kinds = []
    if short:
        reach = "no fixed end: each window is summed up with the summary before it, and fades"
        name = f"short-term, {config.num_short_memory_tokens} tokens per layer"
        kinds.append((name, reach, short))
    if total > short:
        added = max(1, config.num_long_memory_tokens)
        windows = config.long_memory_length // added
        tokens = windows * config.window_length
        reach = f"the last {windows} windows, {tokens:,} tokens; then dropped"
        kinds.append((f"long-term, {added} tokens per window", reach, total - short))
    return kinds or [("none", "the open window alone", 0)]


def describe_evaluation(results: Results, run_dir: Path) -> str:
    """The table of the settings, how they were measured, the one by position, and its plot."""
    evaluation = results["evaluation"]
    parts = [
        evaluation_table(evaluation),
        f"{evaluation['documents']} whole documents that were not trained on, each token scored "
        "once. Carried: the memory goes from window to window; emptied: it is emptied before every "
        f"window. {describe_intervals(evaluation)}One run, seed {results['seed']}.",
        *describe_parts(evaluation),
        position_table(evaluation),
    ]
    if (run_dir / PLOT).is_file():
        parts.append(f"![Perplexity by position in the document]({PLOT})")
    if results["continuation"] is not None:
        parts += describe_continuation(results["continuation"])
    return "\n\n".join(parts)


def describe_intervals(evaluation: Evaluation) -> str:
    """What the brackets mean; nothing where there are none."""
    bootstrap = evaluation.get("bootstrap")
    if bootstrap is None:
        return ""
    if bootstrap["documents"] < bootstrap["fewest_documents"]:
        return f"{bootstrap['documents']} documents are too few for intervals. "
    return (
        f"In brackets: where {bootstrap['level']:.0%} of {bootstrap['resamples']:,} resamples of "
        f"the documents lie ({bootstrap['method']}). "
    )


def describe_parts(evaluation: Evaluation) -> list[str]:
    """What each part of the memory does, if that was measured."""
    if evaluation["settings"].keys() <= {"carried", "emptied"}:
        return []
    return [
        memory_table(evaluation),
        "short_off and long_off: this kind of memory is emptied before every window; queue_N: of "
        "the long-term memory no more is kept than what the newest N windows left.",
    ]


def describe_continuation(continuation: dict[str, Any]) -> list[str]:
    """How the model went on, behind the end of what it read where the results quote that."""
    begin = (
        f"After {continuation['tokens_read']:,} tokens of test documents, of which it held "
        f"{continuation['memory_bytes']:,} bytes, the model"
    )
    written = f"````text\n{continuation['written']}\n````"
    if "read" not in continuation:
        return [f"{begin} went on", written]
    return [f"{begin} read", f"````text\n{continuation['read']}\n````", "and went on", written]


def describe_limits(results: Results) -> str:
    """What the model was not made for, and what its memory does not do."""
    lines = [f"Trained on {describe_corpus(results)} only, and not to follow instructions."]
    worth = results["evaluation"]["worth"]
    if worth is not None:
        lines.append(
            f"On the documents above the memory is worth {percent(worth)} of the perplexity per "
            "token; what lies behind the window is kept compressed, not word for word."
        )
    return "\n".join(lines)


def describe_training(results: Results) -> str:
    """What was run, on what, for how long; the recipe in full."""
    history = results["training"]["history"]
    rows = [
        ("recipe", f"`{results['name']}`, commit `{str(results['commit'])[:12]}`"),
        ("tokens read", f"{history[-1]['tokens']:,} in {history[-1]['step']:,} steps"),
        ("last training loss", f"{history[-1]['loss']:.3f} nats per token"),
        ("hardware", flat(results["hardware"])),
        ("minutes", format_cell(results["minutes"])),
        ("tokens per second", format_cell(results["tokens_per_second"])),
        ("peak memory, GB", format_cell(results["peak_memory_gb"])),
        ("versions", flat(results["versions"])),
    ]
    recipe = json.dumps(results["recipe"], indent=2)
    return f"{markdown_table(['', ''], rows)}\n\n```json\n{recipe}\n```"


def flat(value: Any) -> str:
    """A word, or the pairs of a dictionary on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {flat(each)}" for name, each in value.items())
    return str(value)


def describe_rights(results: Results) -> str:
    """Who may do what with the text that was trained on."""
    corpus = describe_corpus(results)
    if corpus == LIBRARY:
        return f"The text, the sources of {LIBRARY}, is under the PSF License Agreement."
    return f"The text, {corpus}, keeps the licence of its sources."
