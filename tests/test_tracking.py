"""What is told of a run: figures that mean what they say, to any user who is there to draw them."""

import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from melodi_hf.tracking import trackers

from .models import REMEMBERING, WINDOW, build, draw
from .test_trainer import make_trainer, melodi, segments

TAGS = {"loss", "perplexity", "grad_norm", "learning_rate", "tokens_per_second"}
TAGS |= {"num_input_tokens_seen", "gate_openness/1", "short_memory_rms/0", "short_memory_rms/1"}
TAGS |= {"queue_fill/1", "queue_rms/1"}


def figures_after(model, windows):
    """The figures, and the memory that they tell of."""
    with torch.no_grad():
        memory = model(draw(2, windows * WINDOW), return_memory=True).memory
    return model.model.metrics(memory), memory


def size(tokens):
    return sum(row.square().mean().sqrt() for row in tokens) / len(tokens)


@pytest.mark.parametrize(("windows", "filled"), [(1, 2), (2, 4), (5, 6)])
def test_figures_of_melodi_are_those_computed_by_hand(windows, filled):
    model = build("melodi")
    found, memory = figures_after(model, windows)
    wanted = {f"short_memory_rms/{i}": size(layer.short) for i, layer in enumerate(memory.layers)}
    wanted["queue_fill/1"] = torch.tensor(filled / 6)
    wanted["queue_rms/1"] = size(memory.layers[1].long[:, -filled:])
    wanted["gate_openness/1"] = 1 - model.model.layers[1].gate.detach().sigmoid().mean()
    torch.testing.assert_close(found, wanted)


def test_figures_of_other_systems():
    found, memory = figures_after(build("transformer_xl"), 2)
    wanted = {f"memory_rms/{i}": size(layer.values) for i, layer in enumerate(memory.layers)}
    torch.testing.assert_close(found, wanted)
    assert figures_after(build("melodi_no_short", long_memory_layers=()), 1)[0] == {}
    assert "queue_fill/1" not in figures_after(build("melodi", long_memory_layers=()), 1)[0]


@pytest.mark.parametrize("name", REMEMBERING)
def test_figures_of_an_empty_memory_are_numbers(name):
    model = build(name)
    for figure in model.model.metrics(model.model.empty_memory(2)).values():
        assert torch.isfinite(figure)


def test_open_gate_lets_the_queue_in():
    model = build("melodi")
    model.model.layers[1].gate.data.fill_(-100.0)
    assert figures_after(model, 1)[0]["gate_openness/1"] == 1


def test_devices_are_asked_when_figures_are_logged_and_not_before(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, logging_steps=3)
    asked, figures = [], trainer.model.model.metrics

    def counted(memory):
        asked.append(trainer.state.global_step)
        return figures(memory)

    monkeypatch.setattr(trainer.model.model, "metrics", counted)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda tensor: pytest.fail("asked"))
    trainer.train()
    assert asked == [3, 6]
    assert trainer.state.num_input_tokens_seen == 6 * 32


def scalars(folder):
    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_shows_every_step_once(tmp_path):
    """Also of a run that was stopped behind a checkpoint, and went on from it."""
    data = {"evaluated": segments(seed=1), "eval_strategy": "steps", "eval_steps": 3}
    given = {"save_strategy": "steps", "save_steps": 2, "callbacks": trackers(tmp_path / "logs")}
    trainer = make_trainer(tmp_path, max_steps=3, **given, **data)
    trainer.train()
    given["callbacks"] = trackers(tmp_path / "logs")
    resumed = make_trainer(tmp_path, max_steps=6, **given, **data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    events = scalars(tmp_path / "logs")
    assert set(events.Tags()["scalars"]) >= {f"train/{name}" for name in TAGS}
    assert [x.step for x in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [x.step for x in events.Scalars("eval/loss")] == [3, 6]
    logged = [entry for entry in resumed.state.log_history if "loss" in entry]
    for name in TAGS - {"tokens_per_second", "num_input_tokens_seen"}:
        drawn = [x.value for x in events.Scalars(f"train/{name}")]
        assert drawn == pytest.approx([entry[name] for entry in logged], rel=1e-6), name


@pytest.fixture
def fakes(monkeypatch):
    """Weights & Biases and trackio as they are called."""
    fakes = {name: MagicMock(run=None) for name in ("wandb", "trackio")}
    for name, fake in fakes.items():
        fake.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, fake)
    for part in ("sdk", "sdk.lib", "sdk.lib.config_util"):
        monkeypatch.setitem(sys.modules, f"wandb.{part}", fakes["wandb"])
    fakes["wandb"].init.side_effect = lambda **_: setattr(fakes["wandb"], "run", MagicMock())
    fakes["trackio"].context_vars.current_space_id.get.return_value = None
    return fakes


def told(fake):
    """All figures that a tracker was given during training."""
    given = [call.args[0] for call in fake.log.call_args_list]
    return [figures for figures in given if "train/loss" in figures]


@pytest.mark.parametrize("mode", [None, "online"])
def test_trackers_are_told_without_a_network(tmp_path, fakes, monkeypatch, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    make_trainer(tmp_path, melodi(), max_steps=2, callbacks=trackers(tmp_path / "logs")).train()
    (begun,) = fakes["wandb"].init.call_args_list
    assert begun.kwargs["mode"] == (mode or "offline")
    assert begun.kwargs["dir"] == tmp_path / "logs"
    assert fakes["trackio"].init.call_args.kwargs["space_id"] is None, "on this machine"
    for fake in fakes.values():
        assert len(told(fake)) == 2
        assert set(told(fake)[0]) >= {f"train/{name}" for name in TAGS}
        fake.finish.assert_called_once_with()


def test_tracker_that_cannot_be_imported_is_left_out(tmp_path, monkeypatch):
    for name in ("tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    assert trackers(tmp_path) == []
