"""Write the model card of a run: fill the template in with the numbers of its results."""

import json
import re
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import AutoConfig, PreTrainedConfig

import melodi_hf  # noqa: F401  registers the models with AutoConfig
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
PLOT = "perplexity_by_position.png"  # file name of a run's plot
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
text = tokenizer.eos_token + "A document of any length. " * 200  # every document begins with eos
ids = tokenizer(text, return_tensors="pt").input_ids
with torch.no_grad():
    first = model(ids[:, :-1])  # read it in one call, or in pieces
    memory = first.cache  # the memory
    mask = torch.ones_like(ids)  # as long as the whole text: the ids below continue it
    output = model.generate(
        ids[:, -1:], attention_mask=mask, cache=memory, max_new_tokens=20
    )
print(tokenizer.decode(output[0]))"""

CACHE_NOTE = """\
A call without `cache` starts a document with an empty memory. A call with the `cache` of the
previous call
continues the same document. The memory is updated in place and does not grow."""


def write_card(
    run_dir: str | Path,
    results: Results | None,
    *,
    template: str | Path = TEMPLATE,
    repo_id: str | None = None,
    license: str = "apache-2.0",
) -> Path:
    """Write the card of the model in `run_dir`, with the name `repo_id` if it is on the Hub.

    Without results the sections about training and evaluation are left out.
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
        "summary": f"A language model{trained}. It reads documents of any length in windows of "
        f"{config.window_length} tokens, in constant memory. "
        f"Carried from window to window: {system.carries}.",
        "snippet": SNIPPET.format(name=repo_id or display_path(run_dir)),
        "carrying": CACHE_NOTE,
        "memory": describe_memory(config),
        "evaluation": "",  # empty sections are left out
        "limits": "",
        "training": "",
        "data": f"Weights and code: {license}.",
        "citation": f"```bibtex{CITATIONS[config.model_type]}\n```",
    }
    if results is not None:
        fields["evaluation"] = describe_evaluation(results, run_dir)
        fields["limits"] = describe_limits(results)
        fields["training"] = describe_training(results)
        fields["data"] += f" {describe_license(results)}"
    text = Template(Path(template).read_text(encoding="utf-8")).substitute(fields)
    path = run_dir / "README.md"
    path.write_text(EMPTY_SECTION.sub("", text), encoding="utf-8")
    return path


def front_matter(results: Results | None, title: str, license: str) -> str:
    """Return the metadata of the card as YAML."""
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
    """Return the training data and the perplexities in the Hub's metadata format."""
    data, corpus = results["recipe"]["data"], describe_corpus(results)
    measured = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data["source"],
            dataset_name=f"{corpus}, memory {name}",
            dataset_config=name,  # the Hub merges results of the same dataset and configuration
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
    """Name the training data in a few words."""
    data = results["recipe"]["data"]
    if data["source"] == "files":
        return ", ".join(Path(file).name.split(".")[0] for file in data["files"])
    return LIBRARY if data["source"] == "standard_library" else data["source"]


def describe_size(parameters: int) -> str:
    """Format a parameter count: 142K parameters, 3.46M parameters, 1.2B parameters."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= size:
            return f"{parameters / size:.3g}{letter} parameters"
    return f"{parameters} parameters"


def display_path(run_dir: Path) -> str:
    """Return the folder relative to the current one; its name alone if it is outside."""
    folder, here = run_dir.resolve(), Path.cwd()
    return folder.relative_to(here).as_posix() if folder.is_relative_to(here) else folder.name


def describe_memory(config: PreTrainedConfig) -> str:
    """Make a table with one row per memory: reach and size."""
    total = config.memory_floats()
    rows = [(kind, reach, floats, 2 * floats) for kind, reach, floats in list_memories(config)]
    if len(rows) > 1:
        rows.append(("total", "", total, 2 * total))
    assert sum(row[2] for row in rows[: -1 if len(rows) > 1 else None]) == total
    headers = ["memory", "reach", "floats per document", "bytes in bfloat16"]
    return (
        f"{markdown_table(headers, rows)}\n\nThe model attends to all previous tokens within a "
        f"window of {config.window_length} tokens. Of earlier windows only this memory is kept, "
        "whatever the length of the document."
    )


def list_memories(config: PreTrainedConfig) -> list[tuple[str, str, int]]:
    """Return name, reach and size in floats of each memory of the configuration."""
    total = config.memory_floats()
    if config.model_type == "compressive_transformer":
        slots, exact_tokens = config.slots_carried, config.tokens_carried
        floats = config.num_hidden_layers * slots * config.hidden_size
        reach = (
            f"the {slots * config.compression_rate:,} tokens before those; older ones are dropped"
        )
        return [
            ("hidden states", f"{exact_tokens:,} tokens, exactly", total - floats),
            (f"compressed, {slots} slots per layer", reach, floats),
        ]
    exact = f"{config.window_length:,} tokens, exactly"
    if config.model_type == "block_recurrent":
        vectors, layers = config.num_state_vectors, len(config.recurrent_layers)
        state = layers * vectors * config.hidden_size
        reach = "unlimited, fading: updated once per window"
        name = f"state, {vectors} vectors in {layers} of {config.num_hidden_layers} layers"
        kinds = [("keys and values", exact, total - state), (name, reach, state)]
        return kinds if layers else kinds[:1]
    if config.model_type == "memorizing_transformer":
        remembered = 2 * config.memory_length * config.num_attention_heads * config.head_dim
        memory = (
            "keys and values of the long-term memory",
            f"{config.memory_length:,} tokens",
            remembered,
        )
        return [("keys and values", exact, total - remembered), memory]
    if config.model_type != "melodi":
        system = read_systems()[config.model_type]
        return [(system.memory, system.reaches.format(config=config), total)]
    short = config.num_short_memory_tokens * config.num_hidden_layers * config.hidden_size
    kinds = []
    if short:
        reach = "unlimited, fading: each window is summarised together with the previous summary"
        name = f"short-term, {config.num_short_memory_tokens} tokens per layer"
        kinds.append((name, reach, short))
    if total > short:
        added = max(1, config.num_long_memory_tokens)
        windows = config.long_memory_length // added
        tokens = windows * config.window_length
        reach = f"the last {windows} windows, {tokens:,} tokens; older ones are dropped"
        kinds.append((f"long-term, {added} tokens per window", reach, total - short))
    return kinds or [("none", "the current window only", 0)]


def describe_evaluation(results: Results, run_dir: Path) -> str:
    """Write the section on evaluation: tables, method, intervals and plot."""
    evaluation = results["evaluation"]
    parts = [
        evaluation_table(evaluation),
        f"{evaluation['documents']} whole held-out documents, each token scored once. "
        "Carried: the memory is carried from window to window. Emptied: it is reset before every "
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
    """Explain the numbers in brackets; an empty string if there are none."""
    bootstrap = evaluation.get("bootstrap")
    if bootstrap is None:
        return ""
    if bootstrap["documents"] < bootstrap["fewest_documents"]:
        return f"{bootstrap['documents']} documents are too few for intervals. "
    return (
        f"In brackets: {bootstrap['level']:.0%} intervals from {bootstrap['resamples']:,} "
        f"resamples ({bootstrap['method']}). "
    )


def describe_parts(evaluation: Evaluation) -> list[str]:
    """Describe the evaluation without parts of the memory, if it was measured."""
    if evaluation["settings"].keys() <= {"carried", "emptied"}:
        return []
    return [
        memory_table(evaluation),
        "short_off, long_off: the short-term or long-term memory is reset before every window. "
        "queue_N: only the entries of the newest N windows are kept in the long-term memory.",
    ]


def describe_continuation(continuation: dict[str, Any]) -> list[str]:
    """Quote the continuation, after the end of the text that was read if that is recorded."""
    opening = (
        f"After {continuation['tokens_read']:,} tokens of test documents "
        f"({continuation['memory_bytes']:,} bytes of memory)"
    )
    written = f"````text\n{continuation['written']}\n````"
    if "read" not in continuation:
        return [f"{opening} the model continued:", written]
    return [
        f"{opening}, ending in",
        f"````text\n{continuation['read']}\n````",
        "it continued:",
        written,
    ]


def describe_limits(results: Results) -> str:
    """Describe the limitations of the model and of its memory."""
    lines = [f"Trained on {describe_corpus(results)} only; not trained to follow instructions."]
    worth = results["evaluation"]["worth"]
    if worth is not None:
        lines.append(
            f"On these documents the memory reduces the perplexity per token by {percent(worth)}. "
            "Text before the current window is kept in compressed form, not word for word."
        )
    return "\n".join(lines)


def describe_training(results: Results) -> str:
    """Describe the training run: recipe, hardware, time, versions."""
    history = results["training"]["history"]
    rows = [
        ("recipe", f"`{results['name']}`, commit `{str(results['commit'])[:12]}`"),
        ("tokens read", f"{history[-1]['tokens']:,} in {history[-1]['step']:,} steps"),
        ("last training loss", f"{history[-1]['loss']:.3f} nats per token"),
        ("hardware", format_value(results["hardware"])),
        ("minutes", format_cell(results["minutes"])),
        ("tokens per second", format_cell(results["tokens_per_second"])),
        ("peak memory, GB", format_cell(results["peak_memory_gb"])),
        ("versions", format_value(results["versions"])),
    ]
    recipe = json.dumps(results["recipe"], indent=2)
    return f"{markdown_table(['', ''], rows)}\n\n```json\n{recipe}\n```"


def format_value(value: Any) -> str:
    """Format a value, or the pairs of a dictionary, on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {format_value(each)}" for name, each in value.items())
    return str(value)


def describe_license(results: Results) -> str:
    """State the licence of the training text."""
    corpus = describe_corpus(results)
    if corpus == LIBRARY:
        return f"Training text: the source code of {LIBRARY}, under the PSF License Agreement."
    return f"Training text: {corpus}, under the licence of its sources."
