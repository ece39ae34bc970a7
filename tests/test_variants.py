"""Runs of several variants and seeds are compared on the same documents, seed by seed."""

import json
import math
import statistics
from itertools import pairwise

import pytest

from melodi_hf.evaluation import plots, tables
from melodi_hf.evaluation.intervals import compare
from melodi_hf.evaluation.variants import by_variant, difference, position_edges, read_run

from .cases import every_case

TOKENS = (10, 20, 30, 40, 50, 64)  # of each document
EDGES = (0, 8, 16, 32, 64)
LOSSES = {  # nats per token, by seed
    "base": {0: 2.00, 1: 2.02, 2: 2.04},
    "better": {0: 1.90, 1: 1.93, 2: 1.95},
    "single": {5: 2.50},
}


def scored(loss, setting=1.0):
    """Documents of which each is harder than the one before."""
    losses = [loss * setting + 0.1 * i for i in range(len(TOKENS))]
    nll = [each * n for each, n in zip(losses, TOKENS, strict=True)]
    inside = [[max(0, min(n, high) - low) for n in TOKENS] for low, high in pairwise(EDGES)]
    perplexity = math.exp(sum(nll) / sum(TOKENS))
    return {
        "nll": sum(nll),
        "tokens": sum(TOKENS),
        "words": sum(TOKENS) // 2,
        "bytes": sum(TOKENS) * 4,
        "perplexity_per_token": perplexity,
        "perplexity_per_word": perplexity**2,
        "bits_per_byte": math.log2(perplexity) / 4,
        "by_document": [
            {"id": f"book {i}", "tokens": n, "words": n // 2, "bytes": 4 * n, "nll": each}
            for i, (n, each) in enumerate(zip(TOKENS, nll, strict=True))
        ],
        "by_position": [
            {
                "from": low,
                "to": high,
                "tokens": sum(counts),
                "nll": loss * sum(counts),
                "perplexity": math.exp(loss),
            }
            for low, high, counts in zip(EDGES[:-1], EDGES[1:], inside, strict=True)
        ],
    }


def results(loss, seed):
    settings = {"carried": scored(loss), "emptied": scored(loss, 1.1)}
    history = [{"tokens": 1000 * i, "loss": loss + 3 / i} for i in range(1, 41)]
    evaluation = {"window_length": 8, "settings": settings, "worth": 0.1, "documents": 6}
    return {"seed": seed, "training": {"history": history}, "evaluation": evaluation}


@pytest.fixture
def folder(tmp_path):
    """As a comparison lies in a repository."""
    folder = tmp_path / "model_cards" / "results" / "small"
    folder.mkdir(parents=True)
    for variant, losses in LOSSES.items():
        for seed, loss in losses.items():
            (folder / f"{variant}-{seed}.json").write_text(json.dumps(results(loss, seed)))
    return folder


@pytest.fixture
def runs(folder):
    return [read_run(path) for path in sorted(folder.glob("*.json"))]


def test_variant_and_seed_stand_in_the_file_or_in_its_name(folder):
    run = read_run(folder / "better-1.json")
    assert (run.variant, run.seed) == ("better", 1)
    (folder / "long_queue-12").mkdir()
    content = results(2.0, 3)
    inner = folder / "long_queue-12" / "results.json"
    inner.write_text(json.dumps(content))
    assert read_run(inner)[:2] == ("long_queue", 3)
    del content["seed"], content["training"]
    inner.write_text(json.dumps(content))
    assert read_run(inner)[:2] == ("long_queue", 12)
    assert read_run(inner).history == []
    inner.write_text(json.dumps(content | {"variant": "other", "seed": 4}))
    assert read_run(inner)[:2] == ("other", 4)
    inner.rename(folder / "plain.json")
    assert read_run(folder / "plain.json")[:2] == ("other", 4)


def test_a_difference_is_told_over_documents_and_from_seed_to_seed(runs):
    variants = by_variant(runs)
    assert list(variants) == ["base", "better", "single"]
    apart = difference(variants["base"], variants["better"])
    mean = statistics.mean(LOSSES["better"].values()) - statistics.mean(LOSSES["base"].values())
    assert apart.change == pytest.approx(math.expm1(mean))
    # on every document the same, so there is no doubt, though documents differ
    assert apart.interval == pytest.approx([math.expm1(mean)] * 2)
    seeds = {s: math.expm1(LOSSES["better"][s] - LOSSES["base"][s]) for s in (0, 1, 2)}
    assert apart.by_seed == pytest.approx(seeds)
    assert difference(variants["base"], variants["single"]).by_seed == {}
    per_word = difference(variants["base"], variants["better"], unit="words")
    assert per_word.change == pytest.approx(math.expm1(2 * mean))


def test_the_interval_is_that_of_the_mean_over_seeds(runs):
    variants = by_variant(runs)
    for run in variants["better"]:
        rows = run.evaluation["settings"]["carried"]["by_document"]
        rows[0]["nll"] += run.seed  # now the documents disagree
    means = [
        {**row, "nll": statistics.mean(each["nll"] for each in same)}
        for row, *same in zip(
            variants["better"][0].evaluation["settings"]["carried"]["by_document"],
            *(run.evaluation["settings"]["carried"]["by_document"] for run in variants["better"]),
            strict=True,
        )
    ]
    base = variants["base"][1].evaluation["settings"]["carried"]["by_document"]  # the middle one
    wanted = compare(base, means)
    found = difference(variants["base"], variants["better"])
    assert found.interval == pytest.approx(wanted["interval"])
    assert found.interval[1] - found.interval[0] > 0.01


def test_the_table_by_hand(runs):
    lines = tables.variants_table(runs).splitlines()
    found = {v: [scored(x)["perplexity_per_token"] for x in s.values()] for v, s in LOSSES.items()}
    base, better = found["base"], found["better"]
    assert lines[2] == (
        f"| base | 3 | {statistics.mean(base):.2f} ± {statistics.stdev(base):.3f} |  |  |"
    )
    change = 100 * math.expm1(-0.28 / 3)
    low, high = (100 * math.expm1(x) for x in (-0.10, -0.09))
    assert lines[3] == (
        f"| better | 3 | {statistics.mean(better):.3f} ± {statistics.stdev(better):.3f} "
        f"| {change:+.1f}% ({change:+.1f}% to {change:+.1f}%) | {low:+.1f}% to {high:+.1f}% |"
    )
    change = 100 * math.expm1(2.5 - 2.02)
    mean = found["single"][0]
    assert lines[4] == (
        f"| single | 1 | {mean:.2f} | {change:+.1f}% ({change:+.1f}% to {change:+.1f}%) |  |"
    )
    other = tables.variants_table(runs, base="better").splitlines()
    assert "above better" in other[0]
    assert other[2].startswith(f"| base | 3 | {statistics.mean(base):.2f} ± ")
    assert f"| {100 * math.expm1(0.28 / 3):+.1f}% (" in other[2]


def test_a_comparison_of_the_repository_has_its_tables(folder, runs):
    known = tables.all_tables(folder.parents[2])
    assert known["variants/small"] == tables.variants_table(runs)
    assert known["variants/small/better"] == tables.variants_table(runs, "better")
    assert known["results"].count("\n") == 1  # the head alone: they are no recipes of record


def test_runs_that_cannot_be_compared_are_refused(folder, runs):
    with pytest.raises(ValueError, match="'base' has seed 0 twice"):
        by_variant([*runs, runs[0]])
    shorter = results(2.0, 9)
    del shorter["evaluation"]["settings"]["carried"]["by_document"][0]
    (folder / "base-9.json").write_text(json.dumps(shorter))
    with pytest.raises(ValueError, match="6 documents and the other 5"):
        by_variant([*runs, read_run(folder / "base-9.json")])
    shorter["evaluation"]["settings"]["carried"]["by_position"].pop()
    (folder / "base-9.json").write_text(json.dumps(shorter))
    with pytest.raises(ValueError, match="with the same window length"):
        position_edges({"base": runs[:1], "other": [read_run(folder / "base-9.json")]})


def drawn(figure, monkeypatch, *arguments):
    """The lines and bands of a plot, by the function that saves it."""
    kept = []
    monkeypatch.setattr(plots, "save", lambda figure, path: kept.append(figure) or [])
    figure(*arguments)
    (axes,) = kept[0].axes
    return axes


def test_lines_are_means_over_seeds_and_bands_hold_all_of_them(runs, tmp_path, monkeypatch):
    axes = drawn(plots.plot_variants_by_position, monkeypatch, runs, tmp_path / "a")
    for line, band, losses in zip(axes.lines, axes.collections, LOSSES.values(), strict=True):
        perplexities = [math.exp(loss) for loss in losses.values()]
        assert line.get_ydata() == pytest.approx([statistics.mean(perplexities)] * 4)
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.min() == pytest.approx(min(perplexities))
        assert heights.max() == pytest.approx(max(perplexities))
    assert [text.get_text() for text in axes.texts] == list(LOSSES)


def test_differences_are_drawn_seed_by_seed(runs, tmp_path, monkeypatch):
    runs = [*runs[:3], *reversed(runs[3:])]
    axes = drawn(plots.plot_differences_by_position, monkeypatch, runs, tmp_path / "a")
    apart = [100 * math.expm1(LOSSES["better"][s] - LOSSES["base"][s]) for s in (0, 1, 2)]
    assert axes.lines[0].get_ydata() == pytest.approx([0] * 4)
    better = list(by_variant(runs)).index("better")
    assert axes.lines[better].get_ydata() == pytest.approx([statistics.mean(apart)] * 4)
    heights = axes.collections[better].get_paths()[0].vertices[:, 1]
    assert [heights.min(), heights.max()] == pytest.approx([min(apart), max(apart)])


def test_one_command_draws_all_that_is_told(folder, tmp_path, capsys):
    def draw(*names):
        plots.main([*(str(folder / name) for name in names), "--output", str(tmp_path / "out")])
        files = {line.rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines()}
        assert all((tmp_path / "out" / file).stat().st_size for file in files)
        return {file.removesuffix(".png") for file in files if file.endswith(".png")}

    assert draw("base-0.json") == {"perplexity_by_position", "loss"}
    wanted = {"variants_by_position", "differences_by_position", "losses"}
    assert draw("base-0.json", "better-0.json") == wanted
    assert draw("base-0.json", "base-1.json") == {"variants_by_position", "losses"}
    with pytest.raises(SystemExit):
        draw("base-0.json", "base-0.json")
    assert "'base' has seed 0 twice" in capsys.readouterr().err


@every_case(
    ("heights", "wanted"),
    [
        ([], []),
        ([50], [50]),
        ([1], [5]),  # above the lowest place
        ([50, 20], [50, 20]),
        ([50, 52], [46, 56]),
        ([52, 50], [56, 46]),
        ([50, 50, 50], [40, 50, 60]),
        ([50, 58, 80], [49, 59, 80]),
        ([50, 58, 66], [48, 58, 68]),
        ([6, 6, 30], [5, 15, 30]),
    ],
)
def test_labels_move_apart_and_no_farther(heights, wanted):
    assert plots.spread_labels(heights, gap=10, lowest=5) == wanted
