"""Rows of different lengths cost what their tokens cost: who has ended is not computed on."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from melodi_hf import MelodiCache

from .models import EACH, WINDOW, build, draw

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ragged

LIMIT = 1.3  # times the work of equal rows with as many tokens


def flops(model, ids, mask, **how):
    """Of one call, in matrix products."""
    with FlopCounterMode(display=False) as counter:
        model(ids, attention_mask=None if mask.all() else mask, **how)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "described", "side"),
    [
        *(("melodi", described, "left") for described in ragged.LENGTHS),
        *((name, "evenly spread", "right") for name in EACH),
    ],
)
def test_a_ragged_batch_does_little_more_than_an_equal_one(name, described, side):
    model = build(name, attn_implementation="eager").requires_grad_(False)
    lengths = [round(windows * WINDOW) for windows in ragged.LENGTHS[described]]
    total = sum(lengths)
    whole, rest = divmod(total, len(lengths))
    even = [whole + (row < rest) for row in range(len(lengths))]
    for how in (
        {"use_cache": False},
        {"cache": MelodiCache(model.config), "logits_to_keep": 1},
    ):
        work = flops(model, *ragged.batch(lengths, model.config.vocab_size, side), **how)
        if "cache" in how:
            how["cache"] = MelodiCache(model.config)
        assert work <= LIMIT * flops(
            model, *ragged.batch(even, model.config.vocab_size, side), **how
        )


def test_logits_of_padding_are_zero():
    """But for those of the last column."""
    model, ids = build("melodi"), draw(2, 2 * WINDOW)
    mask = torch.rand(ids.shape) < 0.6
    mask[:, -1] = True
    logits = model(ids, attention_mask=mask.long()).logits
    assert (logits[~mask] == 0).all()
    assert (logits[mask] != 0).any(-1).all()


def test_the_benchmark_runs(tmp_path, monkeypatch):
    output = tmp_path / "ragged.json"
    monkeypatch.setattr(
        sys, "argv", ["ragged.py", "--tiny", "--rounds", "1", "--output", str(output)]
    )
    monkeypatch.setattr(ragged, "LENGTHS", {"tiny": [1.5, 2.5, 1, 1, 1, 1, 1, 1]})
    ragged.main()
    assert output.stat().st_size > 0
