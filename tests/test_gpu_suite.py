"""The suite for a GPU runs from a bare checkout, ends in time and loses no result."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu_suite import TINY, Bench, Part, Training, figures, run_all, run_part

from .parity_report import golden_files

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_suite.py"
COMPILED = ("compiled_layers", "compiled_model")
NAMES = [part.function.__name__ for part in gpu_suite.PARTS]


def run_suite(folder, parts):
    output = folder / "results" / "suite.json"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--tiny", "--output", output, "--parts", *parts],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text()), done.stdout


def test_every_part_gives_its_figures(tmp_path):
    parts = [name for name in NAMES if name not in COMPILED]
    results, printed = run_suite(tmp_path, parts)
    assert list(results) == parts
    assert all(f"{name}: " in printed for name in parts)
    assert results["parity"]["within the goal"]
    assert list(results["parity"]["files"]) == [path.stem for path in golden_files()]
    kinds = {"logits", "hidden", "layers", "loss", "state", "grads"}
    assert set(results["parity"]["worst"]) == kinds
    for kind in ("autocast", "bfloat16 weights"):
        assert 0.9 < results["precision"][kind]["gradient cosine, worst"] < 1
        assert results["precision"][kind]["gradient cosine, median of parameters"] > 0.99
    for name in ("training", "training_checkpointed"):
        row = results[name]["largest batch"]
        assert row["batch"] == TINY.max_batch
        expected = row["TFLOP/s"] / results["rates"]["matmul TFLOP/s"]
        assert row["utilisation"] == pytest.approx(expected)
    assert len(results["decoding"]["rows"]) == 4
    assert results["decoding"]["memory bytes equal, batch 1"]
    assert results["decoding"]["memory bytes equal, batch 2"]


@pytest.mark.slow
def test_training_step_compiles_without_a_break(tmp_path):
    results, _ = run_suite(tmp_path, COMPILED)
    assert [results[name]["graph breaks"] for name in COMPILED] == [0, 0]


def fails(bench, found):
    found["before"] = 1
    raise RuntimeError("no such kernel")


def never_ends(bench, found):
    found["before"] = 1
    while True:
        time.sleep(0.01)


def test_failure_is_recorded_and_the_next_part_runs(tmp_path):
    output = tmp_path / "new" / "suite.json"
    parts = (Part(fails, 0, 10), Part(gpu_suite.environment, 0, 30))
    run_all(parts, Bench(TINY, 60), output)
    results = json.loads(output.read_text())
    assert results["fails"]["error"] == "RuntimeError: no such kernel"
    assert results["fails"]["before"] == 1
    assert "torch" in results["environment"]


def test_failure_is_the_exit_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "PARTS", (Part(fails, 0, 10),))
    assert gpu_suite.main(["--tiny", "--output", str(tmp_path / "suite.json")]) == 1
    monkeypatch.setattr(gpu_suite, "PARTS", (Part(never_ends, 0, 0.1),))
    assert gpu_suite.main(["--tiny", "--output", str(tmp_path / "suite.json")]) == 0
    assert "no such kernel" in capsys.readouterr().out


def test_part_that_takes_too_long_is_stopped_and_keeps_what_it_found():
    start = time.perf_counter()
    found = run_part(Part(never_ends, 0, 0.2), Bench(TINY, 60))
    assert time.perf_counter() - start < 5
    assert found["skipped"].startswith("stopped after")
    assert found["before"] == 1
    assert "skipped" in run_part(Part(never_ends, 0, 60), Bench(TINY, 0.2))


def test_part_is_not_begun_without_the_time_it_needs():
    found = run_part(Part(fails, 10, 60), Bench(TINY, 5))
    assert found == {"skipped": "it needs 10 s, 5 s were left"}


class Pretended(Training):
    """Batches up to `room` fit."""

    def __init__(self, bench, room):
        self.bench, self.room, self.tried = bench, room, []

    def attempt(self, batch, steps=1):
        row = {"batch": batch, "seconds of the attempt": 0.0}
        if batch > self.room:
            row["failed"] = "out of memory"
        self.tried.append(row)
        return row


@pytest.mark.parametrize(("room", "found"), [(0, 0), (1, 1), (3, 3), (10, 10), (29, 28), (999, 64)])
def test_search_finds_the_largest_batch_to_an_eighth(room, found):
    bench = Bench(TINY._replace(max_batch=64), 60)
    run = Pretended(bench, room)
    assert run.largest_batch() == found
    assert len(run.tried) <= 10


def test_search_ends_when_time_does():
    run = Pretended(Bench(TINY._replace(max_batch=64), 0.0), 64)
    assert run.largest_batch() == 1


def test_figures_leave_out_the_attempts_of_a_search():
    results = {"training": {"tried": [{"batch": 1}], "largest": {"batch": 2}}, "rows": [{"a": 3}]}
    assert dict(figures(results)) == {"training / largest / batch": 2, "rows / 0 / a": 3}
