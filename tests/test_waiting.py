"""The host never waits for the device: no step depends on the values of tensors there.

Tensors on the meta device have no values, and reading one raises an error.
"""

import pytest
import torch

from melodi_hf import MelodiCache

from .models import EACH, WINDOW, build


def meta(name):
    return build(name).to("meta")


def ids(columns):
    return torch.ones(2, columns, dtype=torch.long, device="meta")


@pytest.mark.parametrize(
    ("name", "skip_logits"), [*((name, True) for name in EACH), ("melodi", False)]
)
def test_training_never_waits(name, skip_logits):
    model, memory = meta(name).train(), None
    for _ in range(2):
        segment = ids(2 * WINDOW)
        how = {"memory": memory, "return_memory": True, "skip_logits": skip_logits}
        output = model(segment, labels=segment, **how)
        output.loss.backward()
        memory = output.memory
    assert all(weight.grad is not None for weight in model.model.embed_tokens.parameters())


@pytest.mark.parametrize("name", EACH)
@torch.no_grad()
def test_reading_never_waits(name):
    """Pieces of any length, then single tokens, beyond the end of a window."""
    model = meta(name)
    cache = MelodiCache(model.config)
    for columns in (2 * WINDOW + 3, *[1] * (WINDOW + 1)):
        logits = model(ids(columns), cache=cache, logits_to_keep=1).logits
    assert logits.shape == (2, 1, model.config.vocab_size)
    assert cache.get_seq_length() == 3 * WINDOW + 4


def test_who_looks_is_told():
    with pytest.raises(RuntimeError, match="meta"):
        bool(ids(1).all())
