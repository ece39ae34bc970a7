"""generate() with a cache gives the same tokens as without."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from melodi_hf import MelodiCache

from .models import (
    DOCUMENT,
    EACH,
    FEW,
    VOCABULARY,
    WINDOW,
    assert_differ,
    assert_equal,
    assert_near,
    build,
    draw,
    tensors_of,
    tokens_read,
)

PROMPTS = [1, WINDOW - 1, WINDOW, WINDOW + 1, DOCUMENT]  # tokens
NEW = WINDOW + 2  # tokens: a window is closed on the way


def generate(model, ids, new=NEW, **how):
    """Greedy by default."""
    torch.manual_seed(1)
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False} | how
    return model.generate(ids, max_new_tokens=new, **how)


def read_again(model, ids):
    """The most likely token at each place, from one call that reads everything."""
    with torch.no_grad():
        return model(ids).logits.argmax(-1)


def test_greedy_tokens_are_those_of_reading_everything_again(model):
    """By induction what `use_cache=False` generates, which reads everything for every token."""
    for length in (1, WINDOW, DOCUMENT):
        ids = draw(2, length)
        found = generate(model, ids)
        assert found.shape == (2, length + NEW)
        assert_equal(found[:, :length], ids)
        assert_equal(found[:, length:], read_again(model, found)[:, length - 1 : -1])


@pytest.mark.parametrize("name", FEW)
def test_greedy_equals_uncached(name):
    model, ids = build(name), draw(2, WINDOW - 1)
    found = generate(model, ids, new=WINDOW)
    assert_equal(found, generate(model, ids, new=WINDOW, use_cache=False))
    assert_equal(found, generate(model, ids, new=WINDOW, cache=MelodiCache(model.config)))


@pytest.mark.parametrize("length", PROMPTS)
def test_generation_equals_uncached_from_prompts_of_any_length(length):
    model, ids = build("melodi"), draw(2, length)
    for how in ({}, {"do_sample": True, "top_k": 0}):
        found = generate(model, ids, new=5, **how)
        assert_equal(found, generate(model, ids, new=5, use_cache=False, **how))


@pytest.mark.parametrize("name", FEW)
def test_sampled_tokens_depend_on_the_seed_alone(name):
    model, ids = build(name), draw(2, WINDOW + 3)
    sampled = {"do_sample": True, "top_k": 0, "num_return_sequences": 3}
    found = generate(model, ids, new=WINDOW, **sampled)
    assert_equal(found, generate(model, ids, new=WINDOW, use_cache=False, **sampled))
    assert len({tuple(row) for row in found.tolist()}) == 6


@pytest.mark.parametrize(
    ("name", "length"), [("melodi", 1), *((name, WINDOW + 3) for name in EACH)]
)
def test_beams_equal_uncached_beams(name, length):
    model, ids = build(name), draw(2, length)
    beams = {"num_beams": 4, "num_return_sequences": 2}
    found = generate(model, ids, new=WINDOW + 2, **beams)
    assert_equal(found, generate(model, ids, new=WINDOW + 2, use_cache=False, **beams))
    assert not torch.equal(found[::2], found[1::2])


def test_rows_padded_on_the_left_equal_the_rows_alone(model):
    rows = [draw(1, length) for length in (DOCUMENT, 2, WINDOW)]
    ids = torch.cat([torch.nn.functional.pad(row, (DOCUMENT - row.shape[1], 0)) for row in rows])
    together = generate(model, ids, attention_mask=(ids > 0).long())[:, DOCUMENT:]
    for found, row in zip(together, rows, strict=True):
        assert_equal(found, generate(model, row)[0, row.shape[1] :])


@pytest.mark.parametrize(
    ("name", "where"), [("melodi", "right"), ("melodi", "middle"), *((n, "anywhere") for n in FEW)]
)
def test_rows_padded_elsewhere_equal_the_rows_alone(name, where):
    model, ids = build(name), draw(3, DOCUMENT)
    mask = torch.rand(ids.shape) < 0.6
    if where != "anywhere":
        mask[:] = True
        for row, missing in enumerate((2, WINDOW + 3, DOCUMENT - 3)):
            first = DOCUMENT - missing if where == "right" else 2
            mask[row, first : first + missing] = False
    for how in ({}, {"use_cache": False}, {"prefill_chunk_size": 5}, {"num_beams": 2}):
        together = generate(model, ids, attention_mask=mask.long(), **how)[:, DOCUMENT:]
        how.pop("prefill_chunk_size", None)
        for found, row, real in zip(together, ids, mask, strict=True):
            alone = row[real][None]
            assert_equal(found, generate(model, alone, **how)[0, alone.shape[1] :])


@pytest.mark.parametrize("name", EACH)
def test_turns_continue_the_memory(name):
    """Three turns; each is given all ids so far, of which the last ones are new."""
    model = build(name)
    cache, ids = MelodiCache(model.config), draw(1, 5)
    for turn in (7, WINDOW, 3):
        found = generate(model, ids, new=6, cache=cache)
        assert_equal(found[:, ids.shape[1] :], read_again(model, found)[:, ids.shape[1] - 1 : -1])
        assert cache.get_seq_length() == found.shape[1] - 1  # the last token is not read yet
        ids = torch.cat((found, draw(1, turn)), dim=1)


@pytest.mark.parametrize("name", EACH)
def test_a_question_about_a_document_that_was_read_in_pieces(name):
    model = build(name)
    document, question = draw(2, DOCUMENT), draw(2, 4)
    cache = MelodiCache(model.config)
    with torch.no_grad():
        for piece in document.split(11, dim=1):
            model(piece, cache=cache)
    ids = torch.cat((document, question), dim=1)
    found = generate(model, question, cache=cache, attention_mask=torch.ones_like(ids))
    assert_equal(found[:, 4:], generate(model, ids)[:, ids.shape[1] :])
    assert not torch.equal(found[:, 4:], generate(model, question)[:, 4:])


def read(model, ids):
    cache = MelodiCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
    return cache


@pytest.mark.parametrize("unequal", [False, True], ids=["at one place", "at different places"])
def test_rows_can_be_repeated_selected_and_reordered(model, unequal):
    first, second = draw(3, WINDOW + 3), draw(3, DOCUMENT)
    mask = torch.ones_like(first)
    mask[1, :6] = not unequal

    def padded_cache():
        cache = MelodiCache(model.config)
        model(first, attention_mask=mask, cache=cache)
        return cache

    ways = {
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
        "batch_select_indices": (torch.tensor([2, 1]), [2, 1]),
        "reorder_cache": (torch.tensor([2, 0, 0]), [2, 0, 0]),
    }
    with torch.no_grad():
        alone = model(second, cache=padded_cache()).logits
        for method, (argument, rows) in ways.items():
            cache, before = padded_cache(), padded_cache()
            getattr(cache, method)(argument)
            assert_equal(tensors_of(cache), [tensor[rows] for tensor in tensors_of(before)])
            assert_equal(tokens_read(cache), tokens_read(before)[rows])
            assert_near(model(second[rows], cache=cache).logits, alone[rows])


def test_a_reordered_row_is_another_row():
    model, first, second = build("melodi"), draw(2, WINDOW + 3), draw(1, 4).expand(2, -1)
    cache, swapped = read(model, first), read(model, first)
    swapped.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        logits = model(second, cache=cache).logits
        other = model(second, cache=swapped).logits
    assert_near(other, logits.flip(0))
    assert_differ(other, logits)


@pytest.mark.parametrize("name", FEW[:2])
def test_the_cache_of_another_model_or_batch_is_refused(name):
    model, other = build(name), next(another for another in EACH if another != name)
    ids = draw(1, 5)
    cases = {
        "written by a model with model_type=.* and this one has .*: it is that of another": read(
            build(other), ids
        ),
        "with head_dim=10 and this one has head_dim=12: it is that of another model": read(
            build(name, head_dim=10), ids
        ),
        r"holds 2 layers .* and this model has 3: give MelodiCache": read(
            build(name, num_hidden_layers=2), ids
        ),
        "holds 2 rows and the batch has 1: repeat or select rows": read(model, draw(2, 5)),
    }
    for message, cache in cases.items():
        with pytest.raises(ValueError, match=message):
            generate(model, torch.cat((ids, ids), dim=1), cache=cache)
    # and its own is not
    generate(model, torch.cat((ids, ids), dim=1), cache=read(model, ids))


def test_keys_and_values_of_every_token_are_refused():
    """What prefix tuning hands over: the model cannot read it."""
    model, cache = build("melodi"), DynamicCache()
    for layer in range(3):
        cache.update(torch.zeros(1, 2, 4, 12), torch.zeros(1, 2, 4, 12), layer)
    with pytest.raises(ValueError, match=r"give MelodiCache\(model.config\), or nothing"):
        model(draw(1, 5), cache=cache)
    with pytest.raises(ValueError, match="holds a memory of windows"):
        MelodiCache(model.config).update(torch.zeros(1, 2, 4, 12), torch.zeros(1, 2, 4, 12), 0)


@pytest.mark.parametrize("name", FEW)
def test_a_cache_without_a_config_is_filled(name):
    model, ids = build(name), draw(2, DOCUMENT)
    cache = DynamicCache()
    with torch.no_grad():
        pieces = [model(piece, cache=cache).logits for piece in ids.split(10, dim=1)]
        assert_near(torch.cat(pieces, dim=1), model(ids).logits)


@pytest.mark.parametrize("name", FEW)
def test_generation_stops_at_the_end_of_the_text(name):
    """A row that has finished is padded and does not change the others."""
    model, ids = build(name), draw(3, 5)
    free = generate(model, ids)
    end = int(free[0, 5 + 3])
    assert end < VOCABULARY
    found = generate(model, ids, eos_token_id=end)
    for row, wanted in zip(found[:, 5:], free[:, 5:], strict=True):
        last = (wanted == end).nonzero()[0].item() if (wanted == end).any() else len(wanted) - 1
        assert_equal(row[: last + 1], wanted[: last + 1])
        assert (row[last + 1 :] == 0).all()


@pytest.mark.parametrize("name", EACH)
def test_what_was_read_in_inference_mode_is_continued_outside_of_it(name):
    model = build(name)
    ids = draw(1, 3 * WINDOW + 5)
    cache = MelodiCache(model.config)
    with torch.inference_mode():
        model(ids[:, :-2], cache=cache)
    continued = model.generate(ids, cache=cache, max_new_tokens=WINDOW, do_sample=False)
    alone = model.generate(ids, max_new_tokens=WINDOW, do_sample=False)
    assert torch.equal(continued, alone)
