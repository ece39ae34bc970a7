"""A comparison is fair, goes on where it was stopped, and keeps what its tables need."""

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import compare
import pytest
import train
import yaml
from parts import compare_speed
from parts.excerpts import ExcerptRequest, prepare_excerpts, sample_evenly
from parts.fairness import check_fair
from parts.recipe import list_recipes, load_recipe, split_name

from melodi_hf.data.segments import Segments
from melodi_hf.evaluation.comparison import comparison_tables
from melodi_hf.trainer import MemoryTrainer

from .text import tiny_tokenizer

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "configuration" / "comparison.yaml"
TINY = {
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.head_dim": 8,
    "model.intermediate_size": 64,
    "model.window_length": 8,
    "data.segment_length": 16,
    "tokenizer.vocab_size": 300,
    "training.steps": 4,
    "training.num_rows": 2,
    "training.log_every": 1,
    "training.save_every": 2,
    "training.warmup_steps": 1,
    "evaluation.segment_windows": 2,
    "evaluation.num_rows": 2,
}
MELODI = {
    "model.type": "melodi",
    "model.num_summary_tokens": 2,
    "model.num_short_memory_tokens": 2,
    "model.long_memory_layers": [1],
    "model.num_long_memory_tokens": 1,
    "model.long_memory_windows": 4,
    "model.intermediate_size": 60,
}
ROWS = {"forgets": {}, "slides": {"model.type": "transformer_xl"}, "remembers": MELODI}


def write_table(folder, rows=ROWS):
    table = folder / "small.yaml"
    base = ROOT / "configuration" / "cpu_mixture.yaml"
    given = yaml.safe_load(base.read_text(encoding="utf-8"))
    for key, value in TINY.items():
        section, name = key.split(".")
        given[section][name] = value
    (folder / "base.yaml").write_text(yaml.safe_dump(given))
    table.write_text(yaml.safe_dump({"base": "base.yaml", "rows": rows}, sort_keys=False))
    return table


def write_texts(path, count, words):
    lines = [
        json.dumps({"id": str(i), "text": " ".join(f"{i}{path.stem}{j % 7}" for j in range(words))})
        for i in range(count)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def command(tmp_path):
    """The arguments of a comparison of seconds, whose folder is `tmp_path / "runs"`."""
    train_files = [write_texts(tmp_path / f"{n}.jsonl", c, 60) for n, c in (("a", 5), ("b", 3))]
    tests = [write_texts(tmp_path / f"{name}_test.jsonl", 6, 12) for name in ("books", "math")]
    return [
        str(write_table(tmp_path)),
        f"--set=data.files=[{', '.join(map(str, train_files))}]",
        f"--output={tmp_path / 'runs'}",
        f"--record={tmp_path / 'kept' / 'small'}",
        "--characters=150",
        "--test",
        *(f"{name}={path}" for name, path in zip(("books", "math"), tests, strict=True)),
    ]


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs begin and end when they are started; how often that was."""
    started = []

    def start(run):
        started.append(str(run))
        try:
            train.main(run.command()[2:])
        except SystemExit as stop:
            (run.output / compare.LOG).write_text(f"bar\rrefused with {stop.code}\n")
            return SimpleNamespace(poll=lambda: 1, returncode=1, terminate=id, wait=id)
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr(compare, "start", start)
    monkeypatch.setattr(compare, "POLL_SECONDS", 0)
    return started


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(arguments)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def record_what_is_fed(monkeypatch):
    """A name of all that the model is fed, as `Segments.digest` names it."""
    fed = []

    def step(trainer, model, inputs, *args, whole=MemoryTrainer.training_step):
        rows = [inputs[key].int().numpy() for key in ("input_ids", "shift_labels", "reset_memory")]
        fed.extend(part.astype("<i4").tobytes() for row in zip(*rows, strict=True) for part in row)
        return whole(trainer, model, inputs, *args)

    monkeypatch.setattr(MemoryTrainer, "training_step", step)
    return lambda: hashlib.sha256(b"".join(fed)).hexdigest()


def kept(tmp_path):
    files = sorted((tmp_path / "kept" / "small").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}


def test_all_systems_are_fed_the_same_tokens_in_the_same_order(
    command, tmp_path, in_this_process, monkeypatch
):
    digests = {}
    for row in ROWS:
        with monkeypatch.context() as patch:
            digest = record_what_is_fed(patch)
            compare.main([*command, "--rows", row])
        digests[row] = digest()
    compare.main([*command, "--rows", "forgets", "--seeds", "1"])
    found = kept(tmp_path)
    assert {row: found[f"{row}-0"]["data"]["order"] for row in ROWS} == digests
    assert len(set(digests.values())) == 1
    assert found["forgets-1"]["data"]["order"] != digests["forgets"]
    for results in found.values():
        assert results["training"]["updates"] == 4
        assert results["training"]["tokens"] == 4 * 2 * 16
        assert results.keys() >= {"commit", "versions", "hardware", "parameters", "memory_floats"}
        assert results["excerpts"]["asked"]["characters"] == 150
        assert str(tmp_path) not in json.dumps(results)
    sizes = [results["parameters"] for results in found.values()]
    assert max(sizes) <= 1.03 * min(sizes)
    tables = comparison_tables(tmp_path / "kept" / "small", tmp_path)
    lines = tables["comparison/small"].splitlines()
    assert [re.match(r"\| `(\w+)`", line)[1] for line in lines[2:]] == list(ROWS)


def test_kinds_of_documents_are_mixed_in_equal_parts(command, tmp_path):
    options = compare.make_parser().parse_args(command)
    recipes = compare.load_rows(options)
    _, (run, other) = compare.prepare_runs(options, ["forgets", "slides"], recipes, tmp_path / "r")
    lines = (tmp_path / "r" / "excerpts" / "train.jsonl").read_text().splitlines()
    documents = [json.loads(line) for line in lines]
    assert [each["id"] for each in documents] == ["a/0", "a/1", "a/3", "b/0", "b/1", "b/2"]
    assert {len(each["text"]) for each in documents} == {150}
    assert run.changes == other.changes
    recipe = load_recipe(run.recipe, run.changes)
    assert [Path(name).name for name in recipe.data.test_files] == ["books.jsonl", "math.jsonl"]
    ids = [[1] * 40] * 6
    shape = {"segment_length": 16, "num_rows": 2, "start_id": 0, "pad_id": 0}
    orders = [Segments(ids, **shape, seed=seed).plan(0).documents[0].tolist() for seed in range(9)]
    assert any(set(order) & {0, 1, 2} and set(order) & {3, 4, 5} for order in orders)


def test_documents_are_taken_at_even_distances():
    assert sample_evenly(list(range(10)), 4) == [0, 2, 5, 7]
    assert sample_evenly(list(range(3)), 4) == [0, 1, 2]


def test_stopped_comparison_goes_on_and_skips_what_is_done(
    command, tmp_path, in_this_process, monkeypatch, capsys
):
    def stop(trainer, *args, step=MemoryTrainer.training_step):
        if trainer.state.global_step == 3 and "slides" in trainer.args.output_dir:
            raise KeyboardInterrupt
        return step(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            compare.main([*command, "--rows", "forgets", "slides"])
    assert set(kept(tmp_path)) == {"forgets-0"}
    capsys.readouterr()
    compare.main([*command, "--rows", "forgets", "slides"])
    assert in_this_process == ["forgets, seed 0", "slides, seed 0", "slides, seed 0"]
    told = capsys.readouterr().out
    assert "forgets, seed 0: already finished" in told
    assert "resuming from" in told
    found = kept(tmp_path)
    assert found["slides-0"]["resumed"]
    assert found["slides-0"]["data"]["order"] == found["forgets-0"]["data"]["order"]


def test_failed_run_does_not_end_the_others(command, tmp_path, in_this_process, monkeypatch):
    def refuse(recipe, name, *others, run=train.run):
        if name == "small_forgets":
            raise SystemExit(3)
        return run(recipe, name, *others)

    monkeypatch.setattr(train, "run", refuse)
    with pytest.raises(SystemExit, match="1 of 2 runs failed: forgets, seed 0"):
        compare.main([*command, "--rows", "forgets", "slides"])
    assert set(kept(tmp_path)) == {"slides-0"}
    log = tmp_path / "runs" / "forgets-0" / compare.LOG
    assert compare.last_line(log) == "refused with 3"


def test_ending_a_comparison_ends_its_runs(tmp_path, monkeypatch):
    """The runs are programs of one line: the first ends at once, the second would not."""
    programs = {"short": "print('done')", "long": "import time; time.sleep(1000)"}
    runs = [compare.Run(name, 0, name, (), tmp_path / name) for name in programs]
    for run in runs:
        run.output.mkdir()
    processes = []

    def start(run, really=compare.start):
        processes.append(really(run))
        return processes[-1]

    monkeypatch.setattr(compare, "start", start)
    command = lambda run: [sys.executable, "-c", programs[run.row]]  # noqa: E731
    monkeypatch.setattr(compare.Run, "command", command)
    monkeypatch.setattr(compare, "record_run", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        compare.run_all(runs, 2, tmp_path, {})
    assert stop.value.code == 143
    assert [process.returncode for process in processes] == [0, -signal.SIGTERM]
    assert (tmp_path / "short" / compare.LOG).read_text() == "done\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_comparison_that_is_killed_goes_on_by_the_same_command(command, tmp_path):
    """In processes of their own, as users run it."""
    script = [sys.executable, str(ROOT / "training" / "compare.py")]
    arguments = [*script, *command, "--rows", "forgets", "--set", "training.steps=200"]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    folder = tmp_path / "runs" / "forgets-0"
    wait_for(lambda: any(folder.glob("checkpoint-*")))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=100) == 143
    with train.hold(folder):  # refused if the run lived on
        pass
    assert not kept(tmp_path)
    subprocess.run(arguments, stderr=subprocess.DEVNULL, check=True)
    assert kept(tmp_path)["forgets-0"]["resumed"]
    assert kept(tmp_path)["forgets-0"]["training"]["updates"] == 200


def wait_for(there, seconds=100):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_table_of_the_repository_is_fair():
    recipes = {split_name(name)[1]: load_recipe(name) for name in list_recipes(TABLE)}
    counts = check_fair(recipes)
    assert list(counts) == list(recipes)
    assert max(counts.values()) <= 1.03 * min(counts.values())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"training.steps": 5}, "row odd has training.steps=5, row forgets has 4: compared rows"),
        ({"training.seed": 1}, "row odd has training.seed=1, row forgets has 0"),
        ({"data.min_tokens": 9}, "row odd has data.min_tokens=9"),
        ({"tokenizer.vocab_size": 301}, "row odd has tokenizer.vocab_size=301"),
        ({"evaluation.num_rows": 1}, "row odd has evaluation.num_rows=1"),
        (
            {"model.intermediate_size": 80},
            r"row odd has 12,\d+ parameters, row forgets 11,\d+, which is more than 3% apart: "
            "try model.intermediate_size=64 instead of 80",
        ),
    ],
)
def test_comparison_that_is_not_fair_is_refused_before_it_begins(
    row, message, command, tmp_path, capsys
):
    write_table(tmp_path, {"forgets": {}, "odd": row})
    assert re.search(message, refused([*command, "--rows", "forgets"], capsys))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--rows", "forgets", "nothing"], "there is no row 'nothing': choose from forgets, sl"),
        (["--test", "books"], "--test books: write NAME=FILE"),
        (["--test", "train=a.jsonl"], "--test train=a.jsonl: write NAME=FILE"),
        (["--set=data.files=[]"], "data.files is empty"),
        (["--test", "books=missing.jsonl"], "no file matches 'missing.jsonl'"),
    ],
)
def test_wrong_arguments_are_refused(others, message, command, tmp_path, capsys):
    assert message in refused([*command, *others], capsys)
    assert not (tmp_path / "runs" / "forgets-0").exists()


def test_other_excerpts_or_recipes_in_the_same_folder_are_refused(command, tmp_path, capsys):
    options = compare.make_parser().parse_args(command)
    recipes = compare.load_rows(options)
    output = (tmp_path / "runs").resolve()
    _, (run,) = compare.prepare_runs(options, ["forgets"], recipes, output)
    begun = json.dumps(load_recipe(run.recipe, run.changes).as_dict())
    (run.output / "recipe.json").write_text(begun)
    compare.prepare_runs(options, ["forgets"], recipes, output)  # the same again
    told = refused([*command, "--characters=99"], capsys)
    assert (
        "has excerpts with characters=150, not 99: pass the same options, or choose another" in told
    )
    told = refused([*command, "--set=training.learning_rate=1"], capsys)
    assert "was started with training.learning_rate=0.005, not 1.0" in told


def test_tokenizer_that_does_not_know_the_text_is_refused(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "letters")
    file = str(write_texts(tmp_path / "a.jsonl", 2, 20))
    asked = ExcerptRequest([file], {"t": file}, 100, 2, str(tmp_path / "letters"), 300)
    with pytest.raises(ValueError, match=r"of the tokens of train are unknown to the tokenizer"):
        prepare_excerpts(tmp_path / "excerpts", asked)


def test_speed_is_measured_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_speed, "READ", 40)
    table = write_table(tmp_path)
    recipes = {row: load_recipe(f"{table}:{row}") for row in ("forgets", "slides")}
    measured = compare_speed.measure_speed(recipes, rounds=2)
    assert [row["row"] for row in measured["rows"]] == list(recipes)
    first = measured["rows"][0]
    assert first["training_time_over_forgets"] == first["decoding_time_over_forgets"] == 1
    for row in measured["rows"]:
        seconds = [wall for wall, _ in measured["rounds"][row["row"]]["decoding"]]
        assert len(seconds) == 2
        speed = row["decoding_tokens_per_second"]
        assert speed == pytest.approx(measured["decoded"] / (sum(seconds) / 2), rel=1e-2)


def test_options_are_these():
    text = compare.make_parser().format_help()
    assert set(re.findall(r"--[a-z-]+", text)) == {
        "--help", "--set", "--test", "--rows", "--seeds", "--jobs", "--output", "--record",
        "--characters", "--limit", "--speed", "--rounds",
    }  # fmt: skip
