"""No logits depend on what comes later; all depend on what came before."""

import pytest
import torch

from .models import (
    DOCUMENT,
    EACH,
    WINDOW,
    assert_differ,
    assert_equal,
    build,
    changed,
    draw,
)

PLACES = [0, 3, WINDOW - 1, WINDOW, 2 * WINDOW + 1, DOCUMENT - 1]


def test_a_token_changes_the_logits_from_its_own_to_the_end_of_the_window_and_none_before(model):
    """Row by row, another token at one of the places."""
    ids = draw(1, DOCUMENT)
    others = torch.cat([changed(ids, 0, place) for place in PLACES])
    with torch.no_grad():
        logits = model(ids.expand_as(others)).logits
        differences = (model(others).logits - logits).abs().amax(-1)
    for place, difference in zip(PLACES, differences, strict=True):
        assert_equal(difference[:place], torch.zeros(place))
        assert difference[place] > 1e-3
        assert (difference[place : (place // WINDOW + 1) * WINDOW] > 1e-4).all()


def test_the_future_has_no_gradient(model):
    ids = draw(1, DOCUMENT)
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    place = WINDOW + 3
    model(inputs_embeds=x).logits[0, place].square().sum().backward()
    assert_equal(x.grad[0, place + 1 :], torch.zeros_like(x.grad[0, place + 1 :]))
    assert (x.grad[0, WINDOW : place + 1].abs().amax(-1) > 0).all()


def without_attention(name, **changes):
    """A model and its copy in which tokens find nothing in each other."""
    model, blind = build(name, **changes), build(name, **changes)
    with torch.no_grad():
        for layer in blind.model.layers:
            layer.self_attn.v_proj.weight.zero_()
    return model, blind


@pytest.mark.parametrize("name", EACH)
def test_a_token_does_not_attend_to_itself(name):
    """The first of a document sees nothing: it has only its residual, but the second sees it."""
    model, blind = without_attention(name, mask_empty_memory=True)
    ids = draw(3, 2)
    with torch.no_grad():
        seeing, unseeing = model(ids).logits, blind(ids).logits
    assert_equal(seeing[:, 0], unseeing[:, 0])
    assert_differ(seeing[:, 1], unseeing[:, 1])


@pytest.mark.parametrize("name", EACH)
def test_empty_memory_is_attended_to_unless_masked(name):
    """Zeros take weight from the second token's only predecessor."""
    ids = draw(3, 2)
    with torch.no_grad():
        attended = build(name, mask_empty_memory=False)(ids).logits
        masked = build(name, mask_empty_memory=True)(ids).logits
    assert_equal(attended[:, 0], masked[:, 0])  # zeros add nothing to nothing
    assert_differ(attended[:, 1], masked[:, 1])
