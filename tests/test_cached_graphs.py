"""Caches that hold a graph: what training with one asks for is said where it goes wrong."""

import copy

import pytest
import torch

from melodi_hf import MelodiCache

from .models import DOCUMENT, EACH, FEW, WINDOW, assert_equal, assert_near, build, draw

LENGTHS = [
    DOCUMENT,
    2 * WINDOW,
    WINDOW + 1,
    3,
]  # in a window, between two, just begun, in the first


@pytest.mark.parametrize("name", EACH)
def test_a_cache_whose_graph_was_freed(name):
    model = build(name)
    for length in LENGTHS:
        ids, cache = draw(2, length), MelodiCache(model.config)
        model(ids, labels=ids, cache=cache).loss.backward()
        message = r"cache.detach_\(\) after each backward; .* return_memory=True .* memory="
        with pytest.raises(ValueError, match=message):
            model(ids, labels=ids, cache=cache).loss.backward()
        cache.detach_()
        model(ids, labels=ids, cache=cache).loss.backward()


@pytest.mark.parametrize("name", EACH)
def test_a_graph_over_two_calls(name):
    """Where nothing was freed, gradients flow through the cache; so they do if a graph is kept."""
    model, ids = build(name), draw(2, DOCUMENT)
    cache = MelodiCache(model.config)
    first = model(ids[:, :WINDOW], cache=cache).logits
    second = model(ids[:, WINDOW:], cache=cache).logits
    assert_near(torch.cat((first, second), dim=1), model(ids).logits)
    first.sum().backward(retain_graph=True)
    model(ids, cache=cache)
    second.sum().backward()


@pytest.mark.parametrize("name", FEW)
def test_copies(name):
    model, ids = build(name), draw(2, DOCUMENT)
    cache = MelodiCache(model.config)
    model(ids, cache=cache)
    with pytest.raises(
        ValueError, match=r"cache\.detach_\(\) first, or cache\.clone\(\), .* memory="
    ):
        copy.deepcopy(cache)
    twins = cache.clone(), copy.deepcopy(cache.detach_())
    with torch.no_grad():
        wanted = model(ids, cache=cache).logits
        for twin in twins:
            assert_equal(model(ids, cache=twin).logits, wanted)
