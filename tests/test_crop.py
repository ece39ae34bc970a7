"""Tokens that were read can be taken back exactly, and assisted decoding rests on it."""

import pickle

import pytest
import torch

from melodi_hf import MelodiCache

from .models import (
    DOCUMENT,
    EACH,
    FEW,
    SYSTEMS,
    WINDOW,
    assert_equal,
    assert_near,
    build,
    draw,
)

SEEN = 2 * WINDOW + 3  # tokens before the recording: two windows and a bit


def read(model, ids, cache=None, **how):
    """A cache after reading `ids`."""
    cache = MelodiCache(model.config) if cache is None else cache
    with torch.no_grad():
        model(ids, cache=cache, **how)
    return cache


def next_logits(model, ids, cache):
    with torch.no_grad():
        return model(ids, cache=cache).logits


IN_PIECES = [5, 1, 9, DOCUMENT - 15]


@pytest.mark.parametrize(
    ("name", "cuts"),
    [(name, IN_PIECES) for name in SYSTEMS]
    + [(name, cuts) for name in FEW for cuts in ([DOCUMENT], [1] * DOCUMENT)],
)
def test_any_number_of_tokens_can_be_taken_back(name, cuts):
    """Over three boundaries of windows, of one call or of many."""
    model, ids = build(name), draw(2, SEEN + DOCUMENT)
    other = draw(2, WINDOW + 3)  # what comes instead
    base = read(model, ids[:, :SEEN])
    base.activate_past_recording()
    whole = base.clone()
    for piece in ids[:, SEEN:].split(cuts, dim=1):
        read(model, piece, whole)
    every = name in FEW and cuts is IN_PIECES  # else at the borders of windows and of calls
    for removed in range(DOCUMENT + 1) if every else (1, 2, 7, 8, 14, 15, 21, DOCUMENT):
        cache, kept = whole.clone(), DOCUMENT - removed
        cache.crop(-removed)
        assert cache.get_seq_length() == SEEN + kept
        fresh = base.clone()
        if kept:
            read(model, ids[:, SEEN : SEEN + kept], fresh)
        assert_near(next_logits(model, other, cache), next_logits(model, other, fresh))


@pytest.mark.parametrize("name", SYSTEMS)
def test_tokens_can_be_taken_back_again_and_again(name):
    """As assisted decoding does: read ahead, take some back, read others."""
    model, truth = build(name), draw(1, 4 * DOCUMENT)
    cache, kept = read(model, truth[:, :3]), 3
    cache.activate_past_recording()
    for ahead, removed in [(5, 5), (7, 2), (1, 1), (WINDOW, 0), (13, 4), (6, 6), (20, 11), (9, 8)]:
        guess = truth[:, kept : kept + ahead].clone()
        guess[:, ahead - removed :] = draw(1, removed)
        read(model, guess, cache)
        cache.crop(-removed)
        kept += ahead - removed
    fresh = read(model, truth[:, :kept])
    following = truth[:, kept : kept + DOCUMENT]
    assert_near(next_logits(model, following, cache), next_logits(model, following, fresh))


def test_rows_of_different_lengths_go_back_each_by_its_own_tokens(model):
    before, ids, following = draw(3, 5), draw(3, DOCUMENT), draw(3, WINDOW + 2)
    mask = torch.rand(3, DOCUMENT) < 0.6  # padding anywhere, also among what is taken back
    begun = read(model, before)
    whole = begun.clone()
    whole.activate_past_recording()
    for first in range(0, DOCUMENT, 6):
        part = slice(first, first + 6)
        read(model, ids[:, part], whole, attention_mask=mask[:, part].long())
    for removed in (1, 4, WINDOW, DOCUMENT - 2):
        cache, kept = whole.clone(), DOCUMENT - removed
        cache.crop(-removed)
        fresh = read(model, ids[:, :kept], begun.clone(), attention_mask=mask[:, :kept].long())
        assert_near(next_logits(model, following, cache), next_logits(model, following, fresh))


@pytest.mark.parametrize("name", EACH)
def test_within_the_open_window_nothing_need_be_recorded(name):
    model, ids = build(name), draw(2, SEEN)
    cache = read(model, ids)
    cache.crop(-2)
    fresh, following = read(model, ids[:, :-2]), draw(2, DOCUMENT)
    assert_near(next_logits(model, following, cache), next_logits(model, following, fresh))


def test_what_cannot_be_taken_back_is_refused_and_nothing_is_lost():
    model, ids = build("melodi"), draw(2, SEEN)
    cache = read(model, ids)
    with pytest.raises(ValueError, match=r"activate_past_recording\(\)"):
        cache.crop(-4)
    for wrong in (1, -SEEN - 1):
        with pytest.raises(ValueError, match=rf"crop\({wrong}\): .* at most the last {SEEN}"):
            cache.crop(wrong)
    following = draw(2, DOCUMENT)
    fresh = read(model, ids)
    assert_equal(next_logits(model, following, cache), next_logits(model, following, fresh))


@pytest.mark.parametrize("name", FEW)
def test_a_recording_does_not_grow_with_the_document(name):
    """Beyond the 1024 columns that can be taken back; a pickle holds all that the cache holds."""
    model = build(name)
    cache = MelodiCache(model.config)
    cache.activate_past_recording()
    sizes = []
    for pieces in (1, 2, 1):
        for _ in range(pieces):
            read(model, draw(1, 64 * WINDOW), cache)
        sizes.append(len(pickle.dumps(cache)))
    assert sizes[0] < sizes[1]
    assert abs(sizes[2] - sizes[1]) < 100  # numbers have more digits


@pytest.mark.parametrize(
    ("name", "helper"),
    [(name, "another") for name in EACH] + [("melodi", "itself"), ("melodi", "prompt_lookup")],
)
def test_assisted_decoding_equals_greedy(name, helper):
    model, ids = build(name), draw(1, WINDOW + 3)
    ids = torch.cat((ids, ids), dim=1)  # something to look up
    assistant = {
        "itself": {"assistant_model": model},
        "another": {"assistant_model": build(name, seed=1)},
        "prompt_lookup": {"prompt_lookup_num_tokens": 5},
    }[helper]
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 3 * WINDOW}
    wanted = model.generate(ids, **how)
    assert_equal(model.generate(ids, **how, **assistant), wanted)
    cache = MelodiCache(model.config)
    assert_equal(model.generate(ids, cache=cache, **how, **assistant), wanted)


@pytest.mark.parametrize("name", FEW)
def test_after_taking_back_a_row_of_padding_goes_on_from_what_is_left(name):
    model, ids = build(name), draw(2, SEEN)
    cache = MelodiCache(model.config)
    cache.activate_past_recording()
    read(model, ids[:, :4], cache)
    read(model, ids[:, 4:], cache)
    cache.crop(-5)
    mask = torch.tensor([[1, 1], [0, 0]])
    with torch.no_grad():
        found = model(draw(2, 2), cache=cache, attention_mask=mask).logits[1, -1]
        assert_near(found, model(ids[1:, :-5]).logits[0, -1])


def test_what_a_row_of_padding_would_go_on_from_may_be_gone():
    model, ids = build("melodi"), draw(2, SEEN)
    cache = read(model, ids)
    cache.crop(-2)
    with pytest.raises(ValueError, match=r"row 1 has nothing but padding right after crop\(\)"):
        read(model, draw(2, 2), cache, attention_mask=torch.tensor([[1, 1], [0, 0]]))


def test_what_was_taken_back_cannot_be_taken_back_again():
    """At most as many columns as were read since, however often some are taken back and read."""
    model, ids = build("melodi"), draw(1, 7 * WINDOW)
    cache = MelodiCache(model.config)
    cache.activate_past_recording()
    read_columns = 0
    for read_now, removed in [(DOCUMENT, 4), (3, 3), (WINDOW, 20), (2, 1)]:
        read(model, ids[:, read_columns : read_columns + read_now], cache)
        read_columns += read_now
        with pytest.raises(ValueError, match=f"at most the last {read_columns};"):
            cache.crop(-(read_columns + 1))
        cache.crop(-removed)
        read_columns -= removed
        assert cache.get_seq_length() == read_columns
        with pytest.raises(ValueError, match=f"at most the last {read_columns};"):
            cache.crop(-(read_columns + 1))
    cache.crop(-read_columns)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="at most the last 0;"):
        cache.crop(-1)
    assert_near(next_logits(model, ids, cache), next_logits(model, ids, MelodiCache(model.config)))


@pytest.mark.parametrize("name", EACH)
def test_tokens_are_taken_back_to_the_end_of_a_window_and_then_more(name):
    """The window that was full there can still be opened again."""
    model, ids, following = build(name), draw(2, 2 * WINDOW + 3), draw(2, WINDOW + 2)
    cache = MelodiCache(model.config)
    cache.activate_past_recording()
    read(model, ids, cache)
    cache.crop(-3)
    cache.crop(-2)
    fresh = read(model, ids[:, : 2 * WINDOW - 2])
    assert_near(next_logits(model, following, cache), next_logits(model, following, fresh))


def test_a_row_of_padding_needs_an_output_that_was_not_taken_back():
    """As many columns are taken back as there are outputs: none is left to go on with."""
    model, ids = build("melodi"), draw(2, WINDOW + 5)
    mask = torch.ones(2, 2).long()
    mask[1] = 0
    for removed in (WINDOW + 5, WINDOW + 6):
        cache = read(model, ids[:, :3])
        cache.activate_past_recording()
        read(model, ids, cache)
        cache.crop(-removed)
        if removed == WINDOW + 5:
            with torch.no_grad():
                found = model(ids[:, :2], attention_mask=mask, cache=cache).logits
                assert_near(found[1, -1], model(ids[:, :3]).logits[1, -1])
    with pytest.raises(ValueError, match=r"row 1 has nothing but padding right after crop\(\)"):
        model(ids[:, :2], attention_mask=mask, cache=cache)


def test_no_more_is_taken_back_than_ids_are_held(monkeypatch):
    monkeypatch.setattr("melodi_hf.models.cache.RECENT", 10)
    model, cache = build("melodi"), MelodiCache(build("melodi").config)
    cache.activate_past_recording()
    for _ in range(3):
        read(model, draw(1, 6), cache)
    with pytest.raises(ValueError, match="at most the last 10;"):
        cache.crop(-11)
    cache.crop(-10)
    assert cache.get_seq_length() == 8
