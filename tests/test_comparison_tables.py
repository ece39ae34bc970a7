"""The tables of a comparison say what its runs say, corpus by corpus, and refuse unfair ones."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest

from melodi_hf.evaluation import comparison, tables
from melodi_hf.evaluation.systems import read_systems

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "model_cards" / "comparison.md"
TOKENS = (10, 20, 30, 40, 50, 64)  # of each document
CORPORA = {"books": 0.0, "math": -0.5}  # how much harder each is
LOSSES = {  # nats per token, by seed; rows by name, in no order
    ("transformer_xl", "transformer_xl"): {0: 2.10, 1: 2.14},
    ("melodi", "melodi"): {0: 2.00, 1: 2.02},
    ("plain_transformer", "plain_transformer"): {0: 2.20, 1: 2.20},
    ("plain_transformer_8_windows", "plain_transformer"): {0: 2.15},
}


def setting(loss):
    documents = [
        {"id": f"{name}/{i}", "tokens": n, "words": n, "bytes": 4 * n, "nll": (loss + harder) * n}
        for name, harder in CORPORA.items()
        for i, n in enumerate(TOKENS)
    ]
    sums = {key: sum(d[key] for d in documents) for key in ("nll", "tokens", "words", "bytes")}
    perplexity = math.exp(sums["nll"] / sums["tokens"])
    return {**sums, "perplexity_per_token": perplexity, "by_document": documents}


def results(system, seed, loss, parameters):
    recipe = {
        "model": {"type": system},
        "data": {"segment_length": 128},
        "training": {"num_rows": 32, "optimizer": "adamw", "learning_rate": 0.005},
    }
    return {
        "recipe": recipe,
        "seed": seed,
        "commit": "0123456789abcdef",
        "hardware": "one core",
        "parameters": parameters,
        "memory_floats": 4096,
        "training": {"updates": 400, "tokens": 1_638_400, "history": []},
        "data": {"train": {"fingerprint": "f"}, "order": f"order of seed {seed}"},
        "evaluation": {"settings": {"carried": setting(loss), "emptied": setting(loss + 0.1)}},
        "excerpts": {
            "asked": {"characters": 16000, "vocab_size": 512},
            "documents": {"books_train": 110, "test books": 6, "test math": 6},
        },
    }


@pytest.fixture
def root(tmp_path):
    """As a comparison lies in a repository, with the speeds of two of its rows."""
    folder = tmp_path / "model_cards" / "results" / "comparison"
    folder.mkdir(parents=True)
    for (row, system), losses in LOSSES.items():
        for seed, loss in losses.items():
            given = results(system, seed, loss, 660_000 + 10_000 * (row == "melodi"))
            (folder / f"{row}-{seed}.json").write_text(json.dumps(given))
    speeds = [
        {"row": row, "training_tokens_per_second": fast, "decoding_tokens_per_second": 300.5}
        for row, fast in {"plain_transformer": 14000.0, "melodi": 7000.0}.items()
    ]
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    path = tmp_path / "benchmarks" / "results" / "comparison.json"
    path.write_text(json.dumps({"rows": speeds}))
    return tmp_path


def cells(table):
    """By the first cell of each row, without the head."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {row[0].strip("`"): row for row in rows}


def change_one(root, name, **changes):
    path = root / "model_cards" / "results" / "comparison" / f"{name}.json"
    given = json.loads(path.read_text())
    for key, value in changes.items():
        part = given
        *parents, last = key.split("__")
        for parent in parents:
            part = part[parent]
        part[last] = value
    path.write_text(json.dumps(given))


def test_a_row_per_model_in_the_order_of_the_systems(root):
    table = tables.all_tables(root)["comparison/comparison"]
    rows = cells(table)
    assert list(rows) == [
        "plain_transformer",
        "plain_transformer_8_windows",
        "transformer_xl",
        "melodi",
    ]
    head = table.splitlines()[0].strip("| ").split(" | ")
    melodi = dict(zip(head, rows["melodi"], strict=True))
    for name, harder in CORPORA.items():
        found = [math.exp(loss + harder) for loss in LOSSES["melodi", "melodi"].values()]
        mean, spread = statistics.mean(found), statistics.stdev(found)
        assert melodi[name] == f"{mean:.3f} ± {spread:.3f}"
    assert melodi["memory, floats"] == "4,096"
    assert melodi["parameters"] == "670,000"
    assert melodi["seeds"] == "2"
    assert (melodi["training, tokens/s"], melodi["decoding, tokens/s"]) == ("7,000", "300.50")
    published = read_systems()["melodi"].published[0]
    assert melodi["paper, another scale"].startswith(f"{published.perplexity} per token, PG-19")
    assert dict(zip(head, rows["plain_transformer_8_windows"], strict=False))["seeds"] == "1"


def test_differences_are_told_of_each_corpus_over_documents_and_seeds(root):
    rows = cells(tables.all_tables(root)["comparison/comparison/differences"])
    assert "plain_transformer" not in rows
    # On every document the same, so there is no doubt, though documents differ.
    change = math.expm1(2.01 - 2.20)
    seeds = [math.expm1(2.00 - 2.20), math.expm1(2.02 - 2.20)]
    told = f"{100 * change:+.1f}% ({100 * change:+.1f}% to {100 * change:+.1f}%)"
    over_seeds = f"{100 * min(seeds):+.1f}% to {100 * max(seeds):+.1f}%"
    assert rows["melodi"][1:] == [told, over_seeds] * 2
    assert rows["plain_transformer_8_windows"][2] == ""  # one seed has no range


def test_orders_stand_below_one_another(root):
    rows = cells(tables.all_tables(root)["comparison/comparison/order"])
    systems = {name: system.published[:1] for name, system in read_systems().items()}
    theirs = rows["papers: PG-19, T5's vocabulary, per token"][1]
    melodi, xl = (systems[name][0].perplexity for name in ("melodi", "transformer_xl"))
    assert f"MELODI {melodi}" in theirs
    assert f"Transformer-XL {xl}" in theirs
    assert theirs.index("MELODI") < theirs.index("Transformer-XL")
    assert re.fullmatch(r"MELODI 7\.\d+ < Transformer-XL 8\.\d+", rows["here: books"][1])
    change_one(root, "melodi-0", evaluation__settings__carried=setting(9.0))
    rows = cells(tables.all_tables(root)["comparison/comparison/order"])
    assert rows["here: books"][1].startswith("Transformer-XL")


def test_every_published_number_has_its_source(root):
    table = tables.all_tables(root)["comparison/comparison/published"]
    for name in ("melodi", "transformer_xl"):
        for number in read_systems()[name].published:
            assert f"| {number.perplexity:g}" in table
            assert f"| {number.source} |" in table


def test_setup_is_told_from_the_runs(root):
    change_one(root, "melodi-1", commit="0123456789abcdef-dirty")
    rows = cells(tables.all_tables(root)["comparison/comparison/setup"])
    assert rows["tokens read in training, padding included"][1] == "1,638,400"
    assert rows["rows x tokens of an update"][1] == "32 x 128"
    assert rows["tokens scored"][1] == f"{2 * sum(TOKENS):,}"
    assert rows["seeds"][1] == "0, 1"
    assert rows["commits"][1] == "0123456789ab, 0123456789ab-dirty"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__order": "another"},
            "has order another, melodi-1.json has order of seed 1: compared",
        ),
        ({"data__train": {"fingerprint": "g"}}, "has documents g"),
        (
            {"training__updates": 399},
            "transformer_xl-1.json has updates 399, melodi-1.json has 400",
        ),
        ({"training__tokens": 9}, "has tokens 9"),
        (
            {"parameters": 690_000},
            "xl-1.json has 690,000 parameters, plain.* more than 3%",
        ),
    ],
)
def test_runs_that_are_not_comparable_give_no_table(root, changes, message):
    change_one(root, "transformer_xl-1", **changes)
    with pytest.raises(ValueError, match=message):
        tables.all_tables(root)


def test_runs_of_another_kind_are_no_comparison(root):
    folder = root / "model_cards" / "results" / "comparison"
    for path in folder.glob("*.json"):
        given = json.loads(path.read_text())
        del given["excerpts"]
        path.write_text(json.dumps(given))
    assert not comparison.comparison_tables(folder, root)


def test_page_holds_all_tables(root):
    asked = re.findall(r"<!-- table: (\S+) -->", PAGE.read_text(encoding="utf-8"))
    assert set(asked) == {name for name in tables.all_tables(root) if name.startswith("comparison")}


@pytest.mark.skipif(
    not (ROOT / "model_cards" / "results" / "comparison").is_dir(), reason="before the first run"
)
def test_page_is_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert tables.update_blocks(text, tables.all_tables(ROOT)) == text
