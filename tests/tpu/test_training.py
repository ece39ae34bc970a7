"""`training/train.py` trains on torch_xla as it does on a processor, without waiting for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS, ROWS, SAVE_EVERY = 20, 4, 8

# Documents end within the run, at different steps in different rows.
WORDS = [90, 400, 150, 260, 40, 330, 210, 500, 120, 300, 180, 60]

TINY = {
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.head_dim": 8,
    "model.intermediate_size": 32,
    "model.window_length": 8,
    "data.source": "files",
    "data.segment_length": 32,
    "tokenizer.vocab_size": 300,
    "training.steps": STEPS,
    "training.num_rows": ROWS,
    "training.learning_rate": 0.002,
    "training.log_every": 1,
    "training.save_every": SAVE_EVERY,
    "training.warmup_steps": 2,
    "evaluation.max_documents": 1,
    "evaluation.segment_windows": 2,
    "evaluation.num_rows": 1,
    "evaluation.read_tokens": 40,
    "evaluation.new_tokens": 2,
}
MELODI = {
    "model.num_summary_tokens": 3,
    "model.num_short_memory_tokens": 3,
    "model.long_memory_layers": [1],
    "model.num_long_memory_tokens": 2,
    "model.long_memory_windows": 6,
}
TRANSFORMER_XL = """
model:
  type: transformer_xl
  hidden_size: 16
  num_hidden_layers: 2
  num_attention_heads: 2
  head_dim: 8
  intermediate_size: 32
  window_length: 8
  initial_embedding_std: 0.3
  initial_temperature: 6.0
  dropout: 0.0
  attention_dropout: 0.0

"""
EAGER = {"USE_TORCH_XLA": "0"}  # both transformers and accelerate look at it
ONE_DEVICE = {"PJRT_DEVICE": "CPU"}
FOUR_DEVICES = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4", "XLA_USE_SPMD": "1"}
ONE_ROW = {"training.num_rows": ROWS // 4}  # on each of them
ADAFACTOR = {
    "training.optimizer": "adafactor",
    "training.schedule": "paper",
    "training.weight_decay": 0.0,
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Documents, and the recipes of both systems."""
    folder = tmp_path_factory.mktemp("tpu")
    for name, lengths in {"train": WORDS, "test": [60]}.items():
        lines = [
            json.dumps(
                {"id": f"{name}{i}", "text": " ".join(f"w{i * n % 23}" for n in range(length))}
            )
            for i, length in enumerate(lengths, start=1)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    quickstart = (ROOT / "configuration" / "quickstart.yaml").read_text()
    (folder / "melodi.yaml").write_text(quickstart)
    rest = quickstart[quickstart.index("data:\n") :]
    (folder / "transformer_xl.yaml").write_text(TRANSFORMER_XL + rest)
    return folder


class Runs:
    """Runs of train.py, each made when it is first asked for."""

    def __init__(self, folder):
        self.folder, self.made = folder, {}

    def __call__(self, system, device, **changes):
        key = repr((system, device, changes))
        if key not in self.made:
            self.made[key] = self.run(f"run{len(self.made)}", system, device, changes)
        return self.made[key]

    def run(self, name, system, device, changes, stop_at=0, resume=False):
        """The losses of its steps, and torch_xla's figures around each."""
        sizes = TINY | (MELODI if system == "melodi" else {})
        files = {
            f"data.{kind}files": self.folder / f"{split}.jsonl"
            for kind, split in (("", "train"), ("test_", "test"))
        }
        asked = {**sizes, **files, **changes}
        figures = self.folder / f"{name}.json"
        watched = [ROOT / "tests/tpu/watched.py", figures, stop_at]
        command = [sys.executable, *([ROOT / "training/train.py"] if device == EAGER else watched)]
        command += [self.folder / f"{system}.yaml", "--output", self.folder / name]
        command += [f"--set={key}={value}" for key, value in asked.items()]
        command += ["--resume"] if resume else []
        path = os.pathsep.join((str(ROOT), str(ROOT / "training")))
        told = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | device
        done = subprocess.run(
            list(map(str, command)), env=told, cwd=self.folder, capture_output=True, text=True
        )
        if stop_at:
            assert done.returncode == 1, done.stderr[-4000:]
            return None
        assert done.returncode == 0, done.stderr[-4000:]
        results = json.loads((self.folder / name / "results.json").read_text())
        assert results["resumed"] == resume
        losses = [entry["loss"] for entry in results["training"]["history"]]
        return losses, None if device == EAGER else json.loads(figures.read_text())


@pytest.fixture(scope="session")
def runs(folder):
    return Runs(folder)


def assert_equal_losses(found, wanted, atol=1e-4):
    assert len(found) == len(wanted) == STEPS
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < atol
    assert wanted[0] - wanted[-1] > 0.1  # or they could be equal for want of training


@pytest.mark.parametrize("system", ["melodi", "transformer_xl"])
def test_losses_of_one_device_equal_those_of_a_processor(runs, system):
    assert_equal_losses(runs(system, ONE_DEVICE)[0], runs(system, EAGER)[0])


@pytest.mark.parametrize("system", ["melodi", "transformer_xl"])
def test_losses_of_four_devices_equal_those_of_a_processor(runs, system):
    """The recipe's rows are those of each device."""
    on_four = runs(system, FOUR_DEVICES, **ONE_ROW)
    assert_equal_losses(on_four[0], runs(system, EAGER)[0])


@pytest.mark.parametrize(
    ("device", "changes"),
    [(ONE_DEVICE, {}), (ONE_DEVICE, ADAFACTOR), (FOUR_DEVICES, ONE_ROW)],
    ids=["one device", "one device, adafactor", "four devices"],
)
def test_steps_wait_for_nothing_and_are_compiled_once(runs, device, changes):
    _, figures = runs("melodi", device, **changes)
    before, after = (
        {entry["step"]: entry for entry in figures if entry["when"] == when}
        for when in ("before", "after")
    )
    assert sorted(before) == sorted(after) == list(range(1, STEPS + 1))
    for step in before:
        for what in ("reads", "fallbacks"):
            assert after[step][what] == before[step][what], (step, what)
    # The losses that are logged between steps are read, or nothing would be counted.
    assert before[STEPS]["reads"] > before[2]["reads"]
    # The first step makes the states of the optimizer, which the second finds.
    assert before[3]["compilations"] <= 10
    assert compiled(before[3], after[SAVE_EVERY]) == 0
    assert compiled(before[SAVE_EVERY + 1], after[2 * SAVE_EVERY]) == 0
    assert compiled(before[2 * SAVE_EVERY + 1], after[STEPS]) == 0
    if (
        device == ONE_DEVICE
    ):  # from several, torch_xla collects the tensors of a checkpoint one by one
        assert compiled(before[3], after[STEPS]) == 0


def compiled(first, last):
    return last["compilations"] - first["compilations"]


def test_weights_and_memory_are_cut_over_the_devices(runs):
    on_one, on_four = (
        runs("melodi", device, **changes)[1][-1]["whole"]
        for device, changes in ((ONE_DEVICE, {}), (FOUR_DEVICES, ONE_ROW))
    )
    assert on_one > 0
    assert on_four == 0


def test_losses_of_adafactor_equal_those_of_a_processor(runs):
    found, wanted = (runs("melodi", device, **ADAFACTOR)[0] for device in (ONE_DEVICE, EAGER))
    assert_equal_losses(found, wanted)


def test_run_that_was_stopped_goes_on_as_if_nothing_had_been(runs):
    whole, _ = runs("melodi", ONE_DEVICE)
    runs.run("stopped", "melodi", ONE_DEVICE, {}, stop_at=SAVE_EVERY + 3)
    found, _ = runs.run("stopped", "melodi", ONE_DEVICE, {}, resume=True)
    assert found == whole


def test_training_in_bfloat16_stays_near(runs):
    found, _ = runs("melodi", ONE_DEVICE, **{"training.precision": "bfloat16"})
    wanted, _ = runs("melodi", EAGER)
    assert 0 < max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 0.05


def test_gradient_checkpointing_is_refused(folder):
    changes = {"training.gradient_checkpointing": True}
    with pytest.raises(
        AssertionError, match="gradient_checkpointing=True is not supported on a TPU"
    ):
        Runs(folder).run("checkpointing", "melodi", ONE_DEVICE, changes)
