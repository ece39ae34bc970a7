"""training/train.py in several processes, started as its users do, to its end."""

import json

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train import main
from transformers import AutoModelForCausalLM

from .cases import every_case
from .launch import ROOT, TORCHRUN, launch
from .test_command_line import tiny  # noqa: F401 (a fixture)

FILES = sorted((ROOT / "configuration" / "accelerate").glob("*.yaml"))
TRAIN = "training/train.py"


def by_accelerate(name, *options):
    path = ROOT / "configuration" / "accelerate" / name
    port = "--main_process_port=0"  # any that is free
    return ("accelerate.commands.launch", "--config_file", str(path), port, *options)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def history(folder):
    return [entry["loss"] for entry in results_of(folder)["training"]["history"]]


def scores(folder):
    return [entry["nll"] for entry in results_of(folder)["evaluation"]["settings"].values()]


def given(arguments, output, **changes):
    """The arguments of a tiny run with another folder and other keys."""
    return [*arguments[:-1], str(output), *(f"--set=training.{k}={v}" for k, v in changes.items())]


@pytest.fixture
def alone(tiny, tmp_path):  # noqa: F811
    """The folder of a run in this process, of four rows."""
    main(given(tiny, tmp_path / "alone", num_rows=4))
    return tmp_path / "alone"


def assert_same_run(found, wanted):
    assert history(found) == pytest.approx(history(wanted), rel=0, abs=1e-5)
    assert scores(found) == pytest.approx(scores(wanted), rel=1e-5)
    ids = torch.arange(40)[None]
    one, two = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (found, wanted))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_two_processes_by_accelerate_equal_one(alone, tiny, tmp_path):  # noqa: F811
    """Whatever precision accelerate is told, that of the recipe counts."""
    launcher = by_accelerate("cpu_2_processes.yaml", "--mixed_precision=bf16")
    launch([TRAIN, *given(tiny, tmp_path / "run")], launcher)
    assert_same_run(tmp_path / "run", alone)
    assert (results_of(tmp_path / "run")["world_size"], results_of(alone)["world_size"]) == (2, 1)
    drawn = [
        EventAccumulator(str(folder / "logs")).Reload() for folder in (tmp_path / "run", alone)
    ]
    tags = [sorted(events.Tags()["scalars"]) for events in drawn]
    assert tags[0] == tags[1]
    for tag in ("train/grad_norm", "train/short_memory_rms/0", "train/queue_rms/1"):
        two, one = ([x.value for x in events.Scalars(tag)] for events in drawn)
        assert len(one) == 4
        assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_two_processes_by_torchrun_equal_one(tiny, tmp_path, optimizer):  # noqa: F811
    same = {"optimizer": optimizer, "gradient_checkpointing": True, "weight_decay": 0.0}
    launch(
        [TRAIN, *given(tiny, tmp_path / "two", gradient_accumulation_steps=2, num_rows=1, **same)]
    )
    main(given(tiny, tmp_path / "one", num_rows=4, **same))
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_fsdp_of_two_processes_equals_one(alone, tiny, tmp_path):  # noqa: F811
    launcher = by_accelerate("gpu_8_fsdp2.yaml", "--num_processes=2", "--mixed_precision=bf16")
    launch(["tests/fsdp_on_processors.py", *given(tiny, tmp_path / "run")], launcher)
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["one process", "torchrun", "FSDP2"])
def test_bfloat16_is_near_float32(alone, tiny, tmp_path, way):  # noqa: F811
    rows = 4 if way == "one process" else 2
    arguments = given(tiny, tmp_path / "run", num_rows=rows, precision="bfloat16")
    if way == "one process":
        main(arguments)
    elif way == "torchrun":
        launch([TRAIN, *arguments], TORCHRUN)
    else:
        launcher = by_accelerate("gpu_8_fsdp2.yaml", "--num_processes=2")
        launch(["tests/fsdp_on_processors.py", *arguments], launcher)
    differences = [
        abs(a - b) for a, b in zip(history(tmp_path / "run"), history(alone), strict=True)
    ]
    assert 1e-6 < max(differences) < 0.02


@every_case("path", FILES, ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    config = load_config_from_file(str(path))
    text = yaml.safe_load(path.read_text())
    assert config.num_processes == text["num_processes"]
    assert f"configuration/accelerate/{path.name}" in path.read_text(), "its command names itself"
    devices = {"NO": 1, "MULTI_GPU": text["num_processes"], "FSDP": text["num_processes"]}
    assert config.num_processes == devices[config.distributed_type.value]
