"""Four rows are four rows: in one batch, in micro-batches, on two devices, sharded, checkpointed,
with scores in between. Losses, gradient norms, scores and figures are the same."""

import json

import pytest
import torch

from . import trajectory
from .launch import launch
from .models import EACH, assert_differ, assert_near, build, draw, read_with_memory

FIGURES = ("short_memory_rms/0", "gate_openness/1", "queue_fill/1", "queue_rms/1")
LOGGED = ("loss", "grad_norm", "num_input_tokens_seen", "learning_rate", *FIGURES)


def together(folder, ways):
    """What each way logged that needs two processes."""
    errors = launch(["-m", "tests.trajectory", folder, ways])
    assert "FSDP2-wrapped module" not in errors  # that a layer returned a view
    return json.loads((folder / "found.json").read_text())


pytestmark = pytest.mark.xdist_group("trajectory")  # the runs are made once


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each way logged."""
    folder = tmp_path_factory.mktemp("trajectory")
    alone = {way: trajectory.train(folder, **given) for way, given in trajectory.ALONE.items()}
    return alone | together(folder, "together")


def values(logged, name):
    return [entry[name] for entry in logged if name in entry]


def assert_same(found, wanted, names):
    for name in names:
        a, b = values(found, name), values(wanted, name)
        assert b, name
        assert a == pytest.approx(b, rel=0, abs=1e-5), name


@pytest.mark.parametrize("way", [*list(trajectory.ALONE)[1:], *trajectory.TOGETHER])
def test_trajectory_is_the_same(found, way):
    steps = [entry for entry in found[way] if "loss" in entry]
    wanted = [entry for entry in found["scored"] if "loss" in entry]
    assert len(steps) == trajectory.STEPS
    assert_same(steps, wanted, LOGGED)
    assert len({round(entry["loss"], 3) for entry in steps}) == trajectory.STEPS


@pytest.mark.parametrize("way", [way for way in trajectory.TOGETHER if "scored" in way])
def test_scores_are_the_same(found, way):
    assert_same(found[way], found["scored"], ["eval_loss"])
    assert len(values(found[way], "eval_loss")) == 2


@pytest.mark.slow
def test_other_models_and_optimisers_have_the_same_trajectory(tmp_path):
    found = together(tmp_path, "others")
    for way, given in trajectory.OTHERS.items():
        wanted = trajectory.train(tmp_path, **given)
        for how in ("DDP", "FSDP2"):
            assert_same(found[f"{way}, {how}"], wanted, ["loss", "grad_norm"])


@pytest.mark.parametrize("name", EACH)
def test_segment_of_eight_windows_equals_two_of_four(name):
    check_segments(name, window=32)


def check_segments(name, window):
    model, ids = build(name, window_length=window), draw(2, 8 * window)
    with torch.no_grad():
        whole = model(ids).logits
        assert_near(read_with_memory(model, ids.split(4 * window, dim=1)), whole)
        forgotten = model(ids[:, 4 * window :]).logits
    assert_differ(forgotten[:, 0], whole[:, 4 * window])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["melodi", "transformer_xl"])
def test_segment_of_4096_equals_two_of_2048(name):
    check_segments(name, window=512)
