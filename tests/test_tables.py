"""Tables, plots and cards say what the results say, and the README's are up to date."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from huggingface_hub import ModelCard

from melodi_hf import (
    CompressiveTransformerConfig,
    MelodiConfig,
    MelodiForCausalLM,
    TransformerXLConfig,
    TransformerXLForCausalLM,
)
from melodi_hf.data.text import Document
from melodi_hf.data.tokens import train_tokenizer
from melodi_hf.evaluation import plots, tables
from melodi_hf.evaluation.cards import describe_memory, write_card
from melodi_hf.evaluation.intervals import describe_bootstrap

ROOT = Path(__file__).parents[1]
WINDOW = 8
LENGTHS = (8, 8, 16, 32, 20)  # tokens in each bin of positions


def setting(perplexities):
    edges = [0, *(WINDOW * 2**i for i in range(len(LENGTHS)))]
    return {
        "nll": 100.0,
        "tokens": 84,
        "words": 40,
        "bytes": 300,
        "perplexity_per_token": perplexities[-1],
        "perplexity_per_word": 12.5,
        "bits_per_byte": 0.48,
        "seconds": 1.0,
        "tokens_per_second": 84.0,
        "by_position": [
            {"from": low, "to": high, "tokens": tokens, "nll": 1.0, "perplexity": perplexity}
            for low, high, tokens, perplexity in zip(
                edges[:-1], edges[1:], LENGTHS, perplexities, strict=True
            )
        ],
        "by_document": [{"id": "a", "tokens": 84, "words": 40, "nll": 100.0}],
    }


@pytest.fixture
def results():
    return {
        "name": "tiny",
        "recipe": {"data": {"source": "standard_library", "files": []}, "training": {"steps": 2}},
        "commit": "0123456789abcdef",
        "versions": {"torch": "2.13"},
        "hardware": "2 cores",
        "seed": 7,
        "parameters": 3_456_789,
        "memory_floats": 96,
        "training": {
            "history": [{"step": i, "loss": 3 / i, "tokens": 1000 * i} for i in range(1, 60)],
            "documents": 3,
        },
        "tokens_per_second": 12345.6,
        "peak_memory_gb": 0.5,
        "minutes": 1.25,
        "evaluation": {
            "window_length": WINDOW,
            "documents": 1,
            "tokens": 84,
            "settings": {
                "carried": setting([5.0, 4.5, 4.0, 3.5, 3.0]),
                "emptied": setting([5.0, 5.0, 5.0, 5.0, 4.0]),
            },
            "worth": 0.25,
        },
        "continuation": {
            "tokens_read": 50_000,
            "memory_bytes": 123_456,
            "read": "the end of what was read",
            "written": "how it went on",
        },
    }


@pytest.fixture
def root(tmp_path, results):
    """A repository with two runs and a benchmark."""
    for folder in ("model_cards/results", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("tiny", "another"):
        path = tmp_path / f"model_cards/results/{name}.json"
        path.write_text(json.dumps(results | {"name": name}))
    rows = [{"model": "melodi", "tokens_per_second": 1500.25}, {"model": "xl", "note": "a|b"}]
    (tmp_path / "benchmarks/results/speed.json").write_text(json.dumps({"rows": rows}))
    return tmp_path


def test_markdown_table():
    table = tables.markdown_table(
        ["name", "count", "value", "mixed"],
        [
            ["a|b", 1234567, 0.12345, 1],
            ["c", 2, 1234.5, "x"],
            ["d", None, 12.345, None],
            ["e", 0, 1234567.0, True],
        ],
    )
    assert table.splitlines() == [
        "| name | count | value | mixed |",
        "|---|--:|--:|---|",
        r"| a\|b | 1,234,567 | 0.123 | 1 |",
        "| c | 2 | 1,234 | x |",
        "| d |  | 12.35 |  |",
        "| e | 0 | 1.23e+06 | True |",
    ]


def test_a_row_of_another_width_is_refused():
    with pytest.raises(ValueError, match="1 cells, the table 2 columns"):
        tables.markdown_table(["a", "b"], [["only one"]])


def test_one_row_for_each_recipe_and_setting(root):
    paths = sorted((root / "model_cards/results").glob("*.json"))
    rows = [line.split(" | ") for line in tables.results_table(paths).splitlines()[2:]]
    assert [row[0] for row in rows] == ["| another", "| another", "| tiny", "| tiny"]
    assert rows[0][1:] == [
        "3,456,789", "96", "carried", "84", "3.000", "12.50", "0.480", "25.0% |"
    ]  # fmt: skip
    assert rows[1][3:6] == ["emptied", "84", "4.000"]


def test_the_worth_at_each_position(results):
    lines = tables.position_table(results["evaluation"]).splitlines()
    assert lines[2] == "| 0 to 7 | 8 | 5.000 | 5.000 | 0.0% |"
    assert lines[-1] == "| 64 to 127 | 20 | 3.000 | 4.000 | 25.0% |"


def test_one_setting_alone_has_no_worth(results):
    evaluation = results["evaluation"]
    del evaluation["settings"]["carried"]
    evaluation["worth"] = None
    assert tables.position_table(evaluation).endswith("| 64 to 127 | 20 | 4.000 |  |")
    assert "%" not in tables.evaluation_table(evaluation)


@pytest.fixture
def measured(results):
    """An evaluation of all parts of the memory, with intervals."""
    evaluation = results["evaluation"]
    settings = evaluation["settings"]
    for name, perplexity in (("long_off", 3.6), ("queue_1", 3.3), ("queue_16", 3.1)):
        settings[name] = setting([5.0, 4.75, 4.5, 4.0, perplexity])
    for name, found in settings.items():
        perplexity = found["perplexity_per_token"]
        found["intervals"] = {
            "perplexity_per_token": [perplexity - 0.5, perplexity + 0.5],
            "perplexity_per_word": [11.0, 14.0],
            "bits_per_byte": [0.45, 0.5],
        }
        if name != "carried":
            found["above_carried"] = perplexity / 3 - 1
            apart = [perplexity / 3 - 1.01, perplexity / 3 - 0.98]
            found["intervals"]["above_carried"] = apart
        if name != "emptied":
            found["worth"] = 1 - perplexity / 4
            found["intervals"]["worth"] = [0.75 - perplexity / 4, 1.125 - perplexity / 4]
    settings["carried"]["by_position"][-1]["intervals"] = {"worth": [0.2, 0.3]}
    evaluation["bootstrap"] = describe_bootstrap(9)
    return evaluation


def test_intervals_stand_in_brackets_beside_their_numbers(measured, root, results):
    carried, emptied, long_off, *_ = tables.evaluation_table(measured).splitlines()[2:]
    assert carried == (
        "| carried | 84 | 3.000 (2.500 to 3.500) | 12.50 (11.00 to 14.00) "
        "| 0.480 (0.450 to 0.500) | 25.0% (0.0% to 37.5%) |"
    )
    assert emptied.endswith("| 0.480 (0.450 to 0.500) |  |")
    assert "| long_off | 84 | 3.600 (3.100 to 4.100) |" in long_off
    assert long_off.endswith("| 10.0% (-15.0% to 22.5%) |")
    (root / "model_cards/results/tiny.json").write_text(json.dumps(results))
    line = tables.results_table([root / "model_cards/results/tiny.json"]).splitlines()[2]
    assert line.endswith("| 84 | 3.000 (2.500 to 3.500) | 12.50 | 0.480 | 25.0% |")
    assert "| 64 to 127 | 20 | 3.000 | 4.000 | 3.600 | 25.0% (20.0% to 30.0%) |" in (
        tables.position_table(measured)
    )


def test_what_each_part_of_the_memory_does(measured, root, results):
    lines = tables.memory_table(measured).splitlines()
    assert lines[0] == "| memory | perplexity per token | above carried | reduction by memory |"
    assert lines[2] == "| carried | 3.000 |  | 25.0% (0.0% to 37.5%) |"
    assert lines[3] == "| emptied | 4.000 | +33.3% (+32.3% to +35.3%) |  |"
    assert lines[4] == "| long_off | 3.600 | +20.0% (+19.0% to +22.0%) | 10.0% (-15.0% to 22.5%) |"
    (root / "model_cards/results/tiny.json").write_text(json.dumps(results))
    assert tables.all_tables(root)["memory/tiny"] == tables.memory_table(measured)


def test_the_plot_of_sizes_shows_each_of_them_with_its_interval(measured, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    plots.plot_by_memory_size(measured, tmp_path / "sizes")
    (axes,) = drawn[0].axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["none", "1", "16", "all"]
    assert axes.lines[0].get_ydata().tolist() == [3.6, 3.3, 3.1, 3.0]
    (bars,) = axes.containers[0].lines[2]
    heights = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert heights[0] == pytest.approx([3.57, 3.66])  # 3 times 1 + 0.19 and 1 + 0.22
    assert heights[3] == [3.0, 3.0]
    assert [text.get_text() for text in axes.texts] == ["memory emptied", "memory carried"]


def test_the_plot_by_position_has_one_line_per_part(measured, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    plots.plot_by_position(measured, tmp_path / "position")
    (axes,) = drawn[0].axes
    words = [text.get_text() for text in axes.texts]
    assert words == ["memory carried", "memory emptied", "without long-term"]
    assert list(axes.lines[2].get_ydata()) == [5.0, 4.75, 4.5, 4.0, 3.6]


def test_blocks_of_a_file_are_renewed(root):
    readme = root / "README.md"
    readme.write_text(
        "# Title\n\n<!-- table: results/tiny -->\nold\nnumbers\n<!-- end -->\n\nText\n"
        "<!-- table: benchmarks/speed -->\n<!-- end -->\nEnd\n"
    )
    tables.main([str(readme), "--root", str(root)])
    once = readme.read_text()
    assert once.startswith("# Title\n\n<!-- table: results/tiny -->\n| memory |")
    assert "| carried | 84 | 3.000 |" in once
    assert "| melodi | 1,500 |  |\n| xl |  | a\\|b |\n<!-- end -->\nEnd\n" in once
    assert "old" not in once
    assert "\n<!-- end -->\n\nText\n" in once
    tables.main([str(readme), "--root", str(root)])
    assert readme.read_text() == once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: unknown -->\n<!-- end -->", "no table 'unknown'"),
        ("<!-- table: results -->\nand no more", "1 blocks begin and 0 end"),
        (
            "<!-- table: results -->\n<!-- table: results/tiny -->\n<!-- end -->",
            "2 blocks begin and 1 end",
        ),
    ],
)
def test_blocks_that_cannot_be_renewed_are_refused(root, text, message):
    with pytest.raises(ValueError, match=message):
        tables.update_blocks(text, tables.all_tables(root))


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")), ids=lambda path: path.name)
def test_tables_of_the_repository_are_up_to_date(path):
    text = path.read_text(encoding="utf-8")
    assert tables.update_blocks(text, tables.all_tables(ROOT)) == text


def test_plots_are_the_same_each_time_and_hold_their_words(results, tmp_path):
    evaluation, history = results["evaluation"], results["training"]["history"]
    files = plots.plot_by_position(evaluation, tmp_path / "position")
    files += plots.plot_loss(history, tmp_path / "loss")
    names = ["position.png", "position.svg", "loss.png", "loss.svg"]
    assert [file.name for file in files] == names
    bytes_before = [file.read_bytes() for file in files]
    plots.plot_by_position(evaluation, tmp_path / "position")
    plots.plot_loss(history, tmp_path / "loss")
    assert [file.read_bytes() for file in files] == bytes_before
    words = " ".join(ElementTree.parse(files[1]).getroot().itertext())
    for word in ("memory carried", "memory emptied", "tokens into the document", "128"):
        assert word in words


def test_a_plot_of_one_point_and_one_setting(results, tmp_path):
    evaluation = results["evaluation"]
    evaluation["settings"] = {"emptied": evaluation["settings"]["emptied"]}
    evaluation["settings"]["emptied"]["by_position"][1:] = []
    plots.plot_by_position(evaluation, tmp_path / "position")
    plots.plot_loss(results["training"]["history"][:1], tmp_path / "loss")


def test_numbers_on_the_axis():
    assert [plots.format_tokens(n) for n in (8, 512, 1024, 1536, 65536, 2**20)] == [
        "8", "512", "1K", "1.5K", "64K", "1M"
    ]  # fmt: skip


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "window_length": WINDOW,
}
SHORT = {"num_summary_tokens": 2, "num_short_memory_tokens": 2}
LONG = {"long_memory_layers": (1,), "num_long_memory_tokens": 1, "long_memory_windows": 3}


@pytest.fixture(params=["melodi", "transformer_xl"])
def run_dir(request, tmp_path, monkeypatch):
    """A folder as training leaves it, seen from the folder above."""
    folder = tmp_path / "runs" / "tiny"
    tokenizer = train_tokenizer([Document("a", "a document of words " * 20)], 300, progress=False)
    sizes = SIZES | {"vocab_size": len(tokenizer), "eos_token_id": 0, "pad_token_id": 1}
    if request.param == "melodi":
        model = MelodiForCausalLM(MelodiConfig(**sizes, **SHORT, **LONG))
    else:
        model = TransformerXLForCausalLM(TransformerXLConfig(**sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_card_is_complete_and_the_hub_understands_it(run_dir, results):
    path = write_card(run_dir, results)
    assert path == run_dir / "README.md"
    card = ModelCard.load(path)
    metadata = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert metadata == {
        "Python's standard library, memory carried": 3.0,
        "Python's standard library, memory emptied": 4.0,
    }
    assert card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    assert "$" not in card.text
    assert "None" not in card.text
    headings = re.findall(r"^## (.*)$", card.text, re.MULTILINE)
    assert headings == re.findall(r"^## (.*)$", template(), re.MULTILINE)
    assert tables.evaluation_table(results["evaluation"]) in card.text
    assert tables.position_table(results["evaluation"]) in card.text
    for number in ("3.46M parameters", "`0123456789ab`", "59,000 in 59 steps", "0.051", "seed 7"):
        assert number in card.text
    for words in ("After 50,000 tokens", "123,456 bytes", "the end of what was read", "it went on"):
        assert words in card.text
    assert str(run_dir) not in card.text


def template():
    return (ROOT / "model_cards" / "template.md").read_text(encoding="utf-8")


def test_card_shows_the_plot_if_there_is_one(run_dir, results):
    assert "](perplexity_by_position.png)" not in write_card(run_dir, results).read_text()
    plots.plot_by_position(results["evaluation"], run_dir / "perplexity_by_position")
    assert "](perplexity_by_position.png)" in write_card(run_dir, results).read_text()


def test_card_says_what_the_brackets_are(run_dir, results, measured):
    text = write_card(run_dir, results).read_text()
    assert "3.000 (2.500 to 3.500)" in text
    assert "In brackets: 95% intervals from 2,000 resamples" in text
    assert tables.memory_table(measured) in text
    measured["bootstrap"] = describe_bootstrap(2)
    assert "2 documents are too few for intervals" in write_card(run_dir, results).read_text()


def test_a_run_may_continue_nothing(run_dir, results):
    results["continuation"] = None
    assert "continued:" not in write_card(run_dir, results).read_text()


def test_a_section_without_content_is_left_out(run_dir, results, tmp_path):
    shorter = tmp_path / "template.md"
    shorter.write_text(template().replace("$limits", "").replace("$citation", ""))
    headings = re.findall(
        r"^## (.*)$", write_card(run_dir, results, template=shorter).read_text(), re.M
    )
    assert "Limits" not in headings
    assert "Citation" not in headings
    assert len(headings) == template().count("\n## ") - 2


def test_the_code_on_the_card_runs(run_dir, results, capsys):
    (code,) = re.findall(
        r"```python\n(.*?)```", write_card(run_dir, results).read_text(), re.DOTALL
    )
    assert 'name = "runs/tiny"' in code
    names: dict = {}
    exec(code, names)
    tokenizer, model, ids = (names[name] for name in ("tokenizer", "model", "ids"))
    whole = model.generate(ids, max_new_tokens=20)[0, ids.shape[1] - 1 :]
    assert len(whole) > 1
    assert capsys.readouterr().out == tokenizer.decode(whole) + "\n"


def test_a_card_for_the_hub_names_the_place_and_the_data(run_dir, results):
    results["recipe"]["data"]["source"] = "owner/books"
    card = ModelCard(write_card(run_dir, results, repo_id="someone/melodi").read_text())
    assert 'name = "someone/melodi"' in card.text
    assert card.data.datasets == ["owner/books"]
    assert "Python's" not in card.text


@pytest.mark.parametrize(
    ("sizes", "kinds"),
    [
        (SHORT | LONG, ["short-term", "long-term", "total"]),
        (SHORT | {"long_memory_layers": ()}, ["short-term"]),
        (SHORT | LONG | {"num_short_memory_tokens": 0}, ["long-term"]),
    ],
)
def test_the_card_counts_what_the_configuration_counts(sizes, kinds):
    config = MelodiConfig(**SIZES, **sizes)
    rows = [line for line in describe_memory(config).splitlines() if line.startswith("| ")][1:]
    assert [re.match(r"\| ([\w-]+)", row)[1] for row in rows] == kinds
    numbers, size = config.memory_floats(), 2 * config.memory_floats()
    assert rows[-1].endswith(f"| {numbers:,} | {size:,} |")


def test_the_card_of_two_memories_tells_how_far_each_reaches():
    sizes = {"window_length": 512, "memory_length": 1024, "compressed_memory_length": 1024}
    told = describe_memory(CompressiveTransformerConfig(**sizes, compression_rate=4))
    rows = [line for line in told.splitlines() if line.startswith("| ")][1:]
    one = 12 * 1024 * 1024
    assert rows == [
        f"| hidden states | 1,024 tokens, exactly | {one:,} | {2 * one:,} |",
        "| compressed, 1024 slots per layer | the 4,096 tokens before those; older ones are "
        f"dropped | {one:,} | {2 * one:,} |",
        f"| total |  | {2 * one:,} | {4 * one:,} |",
    ]
