"""bfloat16 and float16: by autocast, as weights, in training and in generation."""

import pytest
import torch

from .models import (
    DOCUMENT,
    EACH,
    FEW,
    WINDOW,
    assert_equal,
    assert_near,
    build,
    draw,
    read_with_cache,
    read_with_memory,
)

HALVES = [torch.bfloat16, torch.float16]
ERROR = {torch.bfloat16: 0.2, torch.float16: 0.02}  # of logits of size 1


def logits(model, ids, **how):
    with torch.no_grad():
        return model(ids, **how).logits


def assert_close_in_size(found, wanted, dtype):
    """Far from equal in a half, and as near as a half can be."""
    error = (found.float() - wanted).std() / wanted.std()
    assert 1e-5 < error < ERROR[dtype]


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in EACH), ("melodi", torch.float16)]
)
def test_autocast_is_near_to_float32(name, dtype):
    model, ids = build(name), draw(2, DOCUMENT)
    with torch.autocast("cpu", dtype):
        found = logits(model, ids)
    assert found.dtype == dtype
    assert_close_in_size(found, logits(model, ids), dtype)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("dtype", HALVES)
def test_weights_in_half(name, dtype):
    model, ids = build(name), draw(2, DOCUMENT)
    wanted = logits(model, ids)
    found = logits(model.to(dtype), ids)
    assert found.dtype == dtype
    assert_close_in_size(found, wanted, dtype)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
def test_reading_in_pieces(name, autocast):
    """The memory that one piece leaves can be read by the next."""
    model, ids = build(name), draw(2, DOCUMENT)
    if not autocast:
        model = model.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole = model(ids).logits
        for read in (read_with_cache, read_with_memory):
            pieces = read(model, ids.split(WINDOW - 3, dim=1))
            assert_near(pieces, whole, atol=0.1 * whole.abs().max().item())


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
def test_generation(name, autocast):
    model, ids = build(name), draw(2, WINDOW + 3)
    if not autocast:
        model = model.bfloat16()
    how = {"max_new_tokens": WINDOW + 2, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = model.generate(ids, attention_mask=mask, **how)
        assert_equal(found, model.generate(ids, attention_mask=mask, **how))
        alone = model.generate(ids[1:], **how)
    assert found.shape == (2, 2 * WINDOW + 5)
    assert_equal(found[1:], alone)
    with pytest.raises(AssertionError):
        assert_equal(found[:1, WINDOW + 3 :], alone[:, WINDOW + 3 :])
