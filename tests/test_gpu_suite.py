"""The suite for a GPU runs from a bare checkout, ends in time and loses no result."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import flex_attention

from benchmarks import gpu_suite
from benchmarks.gpu_parts import decoding, reading, training, waiting
from benchmarks.gpu_parts.attention import (
    BUCKETS,
    VARIANTS,
    AttentionInputs,
    outputs_and_gradients,
    relative,
)
from benchmarks.gpu_parts.bench import TINY, Bench, OutOfTime, with_goal
from benchmarks.gpu_suite import Part, flatten_goals, flatten_numbers, run_all, run_part, table
from melodi_hf import MelodiCache
from melodi_hf.models import modules, validation
from melodi_hf.models.modules import MASK_VALUE, RelativePosition

from .models import assert_equal, assert_near
from .parity_report import golden_files
from .tape import captured

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_suite.py"
COMPILED = ("compiled_layers", "compiled_model", "decoding_compiled")
NAMES = [part.function.__name__ for part in gpu_suite.PARTS]


pytestmark = pytest.mark.xdist_group("gpu_suite")  # which runs once


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


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Results and what was printed, of all parts but the slow ones."""
    return run_suite(tmp_path_factory.mktemp("suite"), [n for n in NAMES if n not in COMPILED])


def test_every_part_gives_its_figures(suite):
    results, printed = suite
    assert list(results) == [name for name in NAMES if name not in COMPILED]
    assert all(f"{name}: " in printed for name in results)
    assert not [
        name for name, _ in flatten_numbers(results) if name.endswith(("failed", "skipped"))
    ]
    for name in ("training", "training_dropout"):
        rows = results[name]["rows"]
        assert {row["batch"] for row in rows} == set(TINY.batches)
        rate = results["rates"]["matmul TFLOP/s"]
        assert all(row["utilisation"] == pytest.approx(row["TFLOP/s"] / rate) for row in rows)
    assert {row["logits"] for row in results["training"]["rows"]} == {"all", "not kept"}
    assert len(results["decoding"]["rows"]) == 4
    assert results["decoding"]["memory bytes equal, batch 1"]
    assert results["decoding"]["memory bytes equal, batch 2"]
    assert len(results["prefill"]["rows"]) == len(reading.WAYS) * len(TINY.pieces)
    assert {row["model"] for row in results["peers"]["rows"]} == {*reading.NAMES, *reading.SLOW}
    assert results["latency"]["long document, tokens"] == 1000


def test_what_is_computed_is_right(suite):
    results, _ = suite
    assert list(results["parity"]["files"]) == [path.stem for path in golden_files()]
    kinds = {"logits", "hidden", "layers", "loss", "state", "grads"}
    assert set(results["parity"]["worst"]) == kinds
    for name in ("parity", "ragged"):
        assert results[name]["largest difference"]["reached"], results[name]
    for kind in ("autocast", "bfloat16 weights"):
        assert 0.9 < results["precision"][kind]["gradient cosine, worst"] < 1
        assert results["precision"][kind]["gradient cosine, median of parameters"] > 0.99
    assert results["decoding_agrees"]["all agree"]
    rows = [row for row in results["prefill"]["rows"] if row["way"] == "CUDA graph"]
    assert len(rows) == len(TINY.pieces)
    assert all(row["relative difference from eager"] < 0.05 for row in rows)  # bfloat16
    by_way = {row["way"]: row["error of output"] for row in results["attention"]["rows"]}
    assert by_way.keys() == VARIANTS.keys()
    assert max(by_way.values()) < 1e-6


def test_figures_stand_beside_their_goals(suite):
    results, printed = suite
    with_goals = dict(flatten_goals(results))
    assert "training / best utilisation" in with_goals
    assert with_goals["training / best utilisation"][1] == 0.45
    assert with_goals["decoding_replayed / share of the bandwidth at batch 1"][1] == 0.6
    last = printed.splitlines()[-len(with_goals) :]
    assert all(line.startswith(name) for line, name in zip(last, with_goals, strict=True))


@pytest.mark.slow
def test_what_is_compiled_has_no_break(tmp_path):
    results, _ = run_suite(tmp_path, COMPILED)
    told = [results[name] for name in COMPILED[:2]] + results["decoding_compiled"]["rows"]
    assert [row["graph breaks"] for row in told] == [0, 0, 0]
    assert all(row["graphs"] > 0 for row in told)
    assert "share of the bandwidth at batch 1" in results["decoding_compiled"]


def test_all_parts_but_the_last_have_their_time():
    *parts, last = gpu_suite.PARTS
    limit = 9 * 60 - gpu_suite.RESERVE
    assert sum(part.at_most for part in parts) + last.needs <= limit
    assert all(part.needs < part.at_most for part in gpu_suite.PARTS)


def test_goals_are_reached_or_not():
    assert with_goal(0.5, 0.45) == {"reached": True, "value": 0.5, "goal": 0.45}
    assert not with_goal(0.4, 0.45)["reached"]
    assert with_goal(0.4, 0.45, at_most=True)["reached"]
    assert with_goal(None, 0.45)["reached"] is None
    printed = table({"a": {"b": with_goal(0.4, 0.45)}}).splitlines()
    assert printed[-1].split() == ["a", "/", "b", "0.4", "0.45", "False"]


# Graphs: on a CPU their operations are recorded and done again.


@pytest.fixture
def graphs(monkeypatch):
    """Tensors are looked at no more than on a GPU, and graphs are tapes."""
    monkeypatch.setattr(validation, "may_read_values", lambda ids: False)
    monkeypatch.setattr(modules, "count_empty_in_all_rows", lambda k, filled: 0)
    monkeypatch.setattr(decoding, "capture_graph", captured)


@pytest.mark.parametrize("hides", [False, True])
@torch.inference_mode()
def test_replayed_pieces_read_a_document(graphs, hides):
    bench = Bench(TINY, 60)
    model, document = bench.model(mask_empty_memory=hides).eval(), bench.ids(1, 6 * 16)
    piece = reading.ReplayedPiece(model, 32)
    replay = captured(piece.run)
    for _ in range(2):  # it begins again
        piece.reset()
        cache = MelodiCache(model.config)
        for part in document.split(32, dim=1):
            piece.ids.copy_(part)
            replay()
            assert_near(piece.logits, reading.read(model, cache, part, 32))


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_replayed_steps_are_those_of_eager_decoding(graphs, batch):
    bench = Bench(TINY, 60)
    model, ids = bench.model(mask_empty_memory=batch > 1).eval(), bench.ids(batch, 2 * 16 + 14)
    stepping, cache = decoding.StaticDecoder(bench, model, ids), MelodiCache(model.config)
    reading.read(model, cache, ids, len(ids[0]))
    stepping.bench = SimpleNamespace(is_cuda=True)
    stepping.capture()
    for _ in range(40):
        wanted = reading.read(model, cache, stepping.token, 1)
        stepping.advance()
        assert_near(stepping.logits, wanted)
        assert_equal(stepping.token, wanted.argmax(-1))


def test_a_cell_has_the_bias_and_the_mask_of_the_library():
    cell = AttentionInputs(Bench(TINY, 60), (1, 2, 20, 24, 16), torch.float32)
    config = Bench(TINY, 60).config(relative_attention_num_buckets=BUCKETS)
    position = RelativePosition(config)
    position.weight.data.copy_(cell.table.data)
    distance = torch.arange(20)[:, None] + 4 - torch.arange(24)
    assert_near(cell.bias(cell.table), position(distance).masked_fill(distance <= 0, MASK_VALUE))


@pytest.mark.filterwarnings(  # both are torch's own, where FlexAttention is not compiled
    "ignore:flex_attention called without torch.compile", "ignore:The .grad attribute of a Tensor"
)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_way_of_a_cell_has_the_gradients_of_the_exact_one(monkeypatch, name):
    """Also FlexAttention's, whose backward torch refuses on a CPU, though it is there."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    cell = AttentionInputs(Bench(TINY, 60), (2, 2, 20, 24, 16), torch.float32)
    twin = cell.exact()
    exact = outputs_and_gradients(VARIANTS["written out"][0](twin), twin)
    assert all(tensor.dtype == torch.float64 for tensor in exact)
    found = outputs_and_gradients(VARIANTS[name][0](cell), cell)
    assert max(map(relative, found, exact)) < 1e-6


# Failures.


def fails(bench, found):
    found["before"] = 1
    raise RuntimeError("no such kernel")


def never_ends(bench, found):
    found["before"] = 1
    while True:
        time.sleep(0.01)


def hangs(bench, found):
    """As a call into a library that no signal interrupts."""
    bench.hung.wait()


def test_failure_is_recorded_and_the_next_part_runs(tmp_path):
    output = tmp_path / "new" / "suite.json"
    parts = (Part(fails, 0, 10), Part(gpu_suite.correctness.environment, 0, 30))
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


def test_a_device_that_does_not_recover_is_left_to_a_new_process(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "device_works", lambda bench: False)
    parts, begun = (Part(fails, 0, 10), Part(gpu_suite.rates, 0, 30)), []
    run_all(parts, Bench(TINY, 60), tmp_path / "suite.json", begun.append)
    assert begun == [["rates"]]


def test_a_new_process_goes_on_with_what_was_found(tmp_path):
    output = tmp_path / "suite.json"
    output.write_text(json.dumps({"parity": {"error": "unspecified launch failure"}}))
    given = ["--tiny", "--go-on", "--output", str(output), "--minutes", "1"]
    assert gpu_suite.main([*given, "--parts", "environment"]) == 1
    assert list(json.loads(output.read_text())) == ["parity", "environment"]


def test_a_part_that_does_not_come_back_is_given_up(tmp_path, monkeypatch):
    """The thread writes what it knows and begins again with the rest."""
    monkeypatch.setattr(gpu_suite, "GRACE", 0.05)
    bench, begun, output = Bench(TINY, 60), [], tmp_path / "suite.json"
    watch = gpu_suite.run_with_timeout(
        Part(hangs, 0, 0.05), bench, output, lambda: begun.append("again")
    )
    watch.join(10)
    assert begun == ["again"]
    assert "did not come back" in json.loads(output.read_text())["hangs"]["error"]


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


def test_a_batch_that_does_not_fit_is_told(monkeypatch):
    run = training.Training(Bench(TINY, 60))

    def no_room(*_):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(run, "step", no_room)
    assert run.attempt(64)["failed"] == "RuntimeError: CUDA out of memory."
    assert run.best() is None
    found = {}
    training.record_best(found, run)
    assert found == {}
    with pytest.raises(RuntimeError, match="out of memory"):
        training.require_success(run)


def test_what_was_compared_before_time_was_up_is_kept(monkeypatch):
    read_replayed = reading.read_replayed

    def interrupted(bench, model, ids, piece, row):
        if piece == TINY.pieces[-1]:
            raise OutOfTime
        read_replayed(bench, model, ids, piece, row)

    monkeypatch.setattr(reading, "read_replayed", interrupted)
    found = run_part(Part(reading.prefill, 0, 30), Bench(TINY, 60))
    assert found["skipped"].startswith("stopped after")
    assert found["eager / CUDA graph"] > 0


def test_waits_are_counted_by_place(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with waiting.count_synchronizations(SimpleNamespace(is_cuda=True)) as places:
        for _ in range(3):
            waiting.warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert modes == ["warn", "default"]
    assert [name.partition(":")[0] for name in places] == ["tests/test_gpu_suite.py"]
    assert places.total() == 3


def test_figures_leave_out_files_and_traces():
    results = {"parity": {"files": {"a": {"b": 1}}, "worst": {"b": 2}}, "rows": [{"a": 3}]}
    assert dict(flatten_numbers(results)) == {"parity / worst / b": 2, "rows / 0 / a": 3}
