"""The memory of training and the cache of generation convert to each other exactly."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from melodi_hf import MelodiCache

from .models import (
    DOCUMENT,
    EACH,
    FEW,
    WINDOW,
    assert_differ,
    assert_equal,
    assert_near,
    build,
    draw,
    tensors_of,
)

HALVES = [1, WINDOW - 1, 2 * WINDOW, DOCUMENT]  # tokens read before the conversion
NEEDS_STATES = ("melodi", "compressive_transformer")  # hidden states in training, not in generation


def remember(model, ids, memory=None, **how):
    """Read as in training; return the output with the memory."""
    with torch.no_grad():
        return model(ids, memory=memory, return_memory=True, **how)


def tensors(memory):
    return [leaf for leaf in tree_leaves(memory) if isinstance(leaf, torch.Tensor)]


def read_on(model, ids, **how):
    with torch.no_grad():
        return model(ids, **how).logits


def test_reading_goes_on_after_a_conversion_and_back(model):
    for half in HALVES:
        ids, middle = draw(2, half + 3 * WINDOW), half + WINDOW + 2
        wanted = remember(model, ids).logits[:, half:]
        memory = remember(model, ids[:, :half]).memory
        cache = MelodiCache.from_memory(memory, model)
        assert cache.get_seq_length() == half
        found = [read_on(model, ids[:, half:middle], cache=cache)]
        back = cache.to_memory(model)
        found.append(remember(model, ids[:, middle:], back).logits)
        assert_near(torch.cat(found, dim=1), wanted)
        # What was converted is as it was.
        assert_near(remember(model, ids[:, half:], memory).logits, wanted)
        assert_near(read_on(model, ids[:, middle:], cache=cache), wanted[:, middle - half :])


def test_a_memory_comes_back_as_it_was(model):
    for half in HALVES:
        memory = remember(model, draw(2, half)).memory
        again = MelodiCache.from_memory(memory, model).to_memory(model)
        assert type(again) is type(memory)
        pairs = list(zip(tensors(again), tensors(memory), strict=True))
        assert pairs
        for found, wanted in pairs:
            assert_equal(found, wanted)
            assert not wanted.numel() or found.data_ptr() != wanted.data_ptr()


@pytest.mark.parametrize("name", EACH)
def test_what_generation_read_goes_on_in_training(name):
    model, ids = build(name), draw(2, 2 * DOCUMENT)
    wanted = remember(model, ids).logits[:, DOCUMENT:]
    caches = [
        MelodiCache.from_memory(model.model.empty_memory(2), model),
        MelodiCache(model.config),
    ]
    for cache in caches[: 1 if name in NEEDS_STATES else 2]:
        model.read_document(ids[:, :DOCUMENT], cache=cache)
        assert_near(remember(model, ids[:, DOCUMENT:], cache.to_memory(model)).logits, wanted)
    if name in NEEDS_STATES:
        model.read_document(ids, cache=caches[1])
        with pytest.raises(ValueError, match=r"hidden states \(.*from_memory\(model.get_decoder"):
            caches[1].to_memory(model)


def test_rows_at_different_places_are_converted(model):
    ids, more = draw(3, DOCUMENT), draw(3, 2 * WINDOW)
    mask = torch.arange(DOCUMENT) < torch.tensor([[DOCUMENT], [3], [2 * WINDOW]])
    memory = remember(model, ids, attention_mask=mask).memory
    wanted = remember(model, more, memory).logits
    cache = MelodiCache.from_memory(memory, model)
    assert_near(read_on(model, more[:, :5], cache=cache), wanted[:, :5])
    back = cache.to_memory(model)
    assert_near(remember(model, more[:, 5:], back).logits, wanted[:, 5:])
    assert_near(read_on(model, more[:, 5:], cache=cache), wanted[:, 5:])


@pytest.mark.parametrize("name", FEW)
def test_a_trained_memory_answers_questions(name):
    """A memory of a training loop is converted and passed to generate() for several turns."""
    model, ids, question = build(name), draw(1, DOCUMENT), draw(1, 3)
    cache = MelodiCache.from_memory(remember(model, ids).memory, model)
    whole = torch.cat((ids, question), dim=1)
    how = {"do_sample": False, "max_new_tokens": WINDOW}
    wanted = model.generate(whole, **how)
    assert_equal(model.continue_from(cache, question, **how), wanted[:, DOCUMENT:])
    out = model.continue_from(cache, question, return_dict_in_generate=True, **how)
    following = draw(1, 9)
    logits = read_on(model, torch.cat((wanted, following), dim=1))[:, -9:]
    assert_near(read_on(model, following, cache=out.cache), logits)
    assert_equal(model.generate(whole, cache=cache, **how), wanted)


@pytest.mark.parametrize("name", EACH)
def test_a_converted_memory_is_saved_and_loaded(name, tmp_path):
    model, ids, more = build(name), draw(2, DOCUMENT), draw(2, DOCUMENT)
    wanted = read_on(model, torch.cat((ids, more), dim=1))[:, DOCUMENT:]
    MelodiCache.from_memory(remember(model, ids).memory, model).save(tmp_path / "memory")
    cache = MelodiCache.load(tmp_path / "memory", model=model)
    assert_near(remember(model, more, cache.to_memory(model)).logits, wanted)
    mask = torch.tensor([[0], [1]])
    with pytest.raises(ValueError, match="row 0 has nothing but padding right after"):
        model(more[:, :1], attention_mask=mask, cache=cache)
    assert_near(read_on(model, more, cache=cache), wanted)


@pytest.mark.parametrize("name", EACH)
def test_what_was_forgotten_stays_forgotten(name, tmp_path):
    model, more = build(name), draw(2, WINDOW + 2)
    memory = remember(model, draw(2, 3 * WINDOW)).memory
    kinds = dict.fromkeys(model.model.windows_kept(), 0)
    cut = model.model.forget(memory, **kinds)
    wanted = remember(model, more, cut).logits
    assert_differ(wanted, remember(model, more, memory).logits)
    cache = MelodiCache.from_memory(cut, model)
    cache.save(tmp_path / "memory")
    loaded = MelodiCache.load(tmp_path / "memory")
    assert_near(remember(model, more, loaded.to_memory(model)).logits, wanted)
    for each in (loaded, cache):
        assert_near(read_on(model, more, cache=each), wanted)


def test_no_graph_is_carried_over():
    model = build("melodi")
    memory = model(draw(1, DOCUMENT), return_memory=True).memory
    cache = MelodiCache.from_memory(memory, model)
    assert not any(t.requires_grad for t in tensors_of(cache))
    model(draw(1, 3), cache=cache)
    assert not any(t.requires_grad for t in tensors(cache.to_memory(model)))


@pytest.mark.parametrize("name", EACH)
def test_a_memory_of_another_precision_is_converted(name):
    for dtype in (torch.bfloat16, torch.float64):
        model, ids = build(name).to(dtype), draw(1, DOCUMENT)
        memory = remember(model, ids).memory
        back = MelodiCache.from_memory(memory, model).to_memory(model)
        for found, wanted in zip(tensors(back), tensors(memory), strict=True):
            assert_equal(found, wanted)


def test_what_does_not_convert():
    model, ids = build("melodi"), draw(1, DOCUMENT)
    memory, cache = remember(model, ids).memory, model.read_document(ids)
    with pytest.raises(ValueError, match=r"memory is a MelodiCache: .*cache.to_memory\(model\)"):
        MelodiCache.from_memory(cache, model)
    with pytest.raises(ValueError, match=r"memory is a MelodiCache: .*cache.to_memory\(model\)"):
        model(ids, memory=cache)
    with pytest.raises(ValueError, match=r"cache is a Memory, .*MelodiCache.from_memory\(memory"):
        model(ids, cache=memory)
    with pytest.raises(ValueError, match="memory is a NoneType: give what a call with"):
        MelodiCache.from_memory(None, model)
    with pytest.raises(ValueError, match="the cache has read no token yet"):
        MelodiCache(model.config).to_memory(model)
    with pytest.raises(ValueError, match="the memory has 0 rows"):
        MelodiCache.from_memory(model.model.empty_memory(0), model)
    with pytest.raises(ValueError, match="that of another model"):
        MelodiCache.from_memory(memory, build("transformer_xl"))
    with pytest.raises(ValueError, match="that of another model"):
        cache.to_memory(build("melodi", num_summary_tokens=4))
    with pytest.raises(ValueError, match=r"dropout=0.2, .* call model.eval\(\)"):
        MelodiCache.from_memory(memory, build("melodi", dropout=0.2).train())
