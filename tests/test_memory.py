"""The memory reaches across windows, forgets what it should, is a value, and never grows."""

import copy
import time
from itertools import pairwise
from statistics import median

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import DynamicCache

from melodi_hf import MelodiCache
from melodi_hf.models.cache import memory_bytes
from melodi_hf.models.costs import held_bytes

from .models import (
    DOCUMENT,
    EACH,
    REMEMBERING,
    SYSTEMS,
    TINY,
    WINDOW,
    assert_differ,
    assert_equal,
    assert_near,
    build,
    changed,
    draw,
)


def tensors(memory):
    return [leaf for leaf in tree_leaves(memory) if isinstance(leaf, torch.Tensor)]


def effect(model, place, columns):
    """What another token at a place changes in each column's logits."""
    ids = draw(1, columns)
    with torch.no_grad():
        difference = model(ids).logits - model(changed(ids, 0, place)).logits
    return difference[0].abs().amax(-1)


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_window_changes_all_later_ones(name):
    difference = effect(build(name), 3, 3 * WINDOW)
    assert (difference[WINDOW:] > 1e-6).all()


def test_without_memory_windows_are_independent():
    difference = effect(build("melodi_no_memory"), 3, 3 * WINDOW)
    assert_equal(difference[WINDOW:], torch.zeros(2 * WINDOW))
    assert (difference[3:WINDOW] > 1e-4).all()


def test_transformer_xl_sees_one_window_per_layer_and_no_token_more():
    difference = effect(build("transformer_xl"), 0, 4 * WINDOW)
    reach = TINY["num_hidden_layers"] * WINDOW
    assert difference[reach] > 0
    assert_equal(difference[reach + 1 :], torch.zeros(WINDOW - 1))


@pytest.mark.parametrize("name", ["melodi", "melodi_no_short", "melodi_no_long"])
def test_an_emptied_memory_has_no_effect(name):
    """The opposite of reaching across windows: what reaches is in the memory and nowhere else."""
    model, ids = build(name), draw(2, 2 * WINDOW)
    with torch.no_grad():
        memory = model(ids[:, :WINDOW], return_memory=True).memory
        zeros = memory._replace(layers=tree_map(torch.zeros_like, memory.layers))
        emptied = model(ids[:, WINDOW:], memory=zeros).logits
        assert_equal(emptied, model(ids[:, WINDOW:]).logits)
        assert_differ(model(ids[:, WINDOW:], memory=memory).logits, emptied)


def test_the_queue_forgets_its_oldest_tokens():
    model, ids = build("melodi_no_short"), draw(1, 6 * WINDOW)
    capacity, pushed = model.config.long_memory_length, model.config.num_long_memory_tokens

    def queue(memory):
        return memory.layers[1].long

    with torch.no_grad():
        before = model(ids[:, : 4 * WINDOW], return_memory=True).memory
        after = model(ids[:, 4 * WINDOW : 5 * WINDOW], memory=before, return_memory=True).memory
        assert_equal(queue(after)[:, : capacity - pushed], queue(before)[:, pushed:])
        # A mark in the oldest slots moves the window that reads them; then they are gone.
        marked = tree_map(lambda leaf: leaf, before)
        layer = before.layers[1]
        long = layer.long.clone()
        long[:, :pushed] += 1
        layers = (before.layers[0], layer._replace(long_tokens=long), before.layers[2])
        marked = before._replace(layers=layers)
        read = model(ids[:, 4 * WINDOW : 5 * WINDOW], memory=marked, return_memory=True)
        assert_equal(queue(read.memory)[:, : capacity - pushed], queue(before)[:, pushed:])
        plain = model(ids[:, 4 * WINDOW : 5 * WINDOW], memory=before).logits
    assert_differ(read.logits, plain, by=1e-6)


@pytest.mark.parametrize("name", ["melodi", "melodi_no_short", "melodi_odd_queue"])
def test_the_queue_fills_from_its_newest_end(name):
    model, ids = build(name), draw(2, 2 * WINDOW)
    pushed = model.config.num_long_memory_tokens
    with torch.no_grad():
        queues = [
            model(ids[:, :end], return_memory=True).memory.layers[1].long
            for end in (WINDOW - 1, WINDOW, 2 * WINDOW)
        ]
    for windows, queue in enumerate(queues):
        filled = queue.abs().amax(-1) > 0
        wanted = torch.arange(queue.shape[1]) >= queue.shape[1] - windows * pushed
        assert_equal(filled, wanted.expand_as(filled))


@pytest.mark.parametrize(
    ("length", "carrier"), [(WINDOW, "memory"), (WINDOW + 5, "memory"), (WINDOW + 5, "cache")]
)
def test_reset_memory_forgets_in_its_rows_alone(model, length, carrier):
    ids, reset = draw(3, length + DOCUMENT), torch.tensor([False, True, False])
    first, second = ids[:, :length], ids[:, length:]
    if carrier == "cache":
        cache = MelodiCache(model.config)
        carried = {"cache": cache}
    with torch.no_grad():
        if carrier == "cache":
            model(first, cache=cache)
        else:
            carried = {"memory": model(first, return_memory=True).memory}
        logits = model(second, reset_memory=reset, **carried).logits
        whole, fresh = model(ids).logits[:, length:], model(second).logits
    assert_near(logits[~reset], whole[~reset])
    assert_near(logits[reset], fresh[reset])


@pytest.mark.parametrize("name", REMEMBERING)
def test_without_a_reset_the_document_goes_on(name):
    model, ids = build(name), draw(1, 2 * WINDOW)
    with torch.no_grad():
        memory = model(ids[:, :WINDOW], return_memory=True).memory
        kept = model(ids[:, WINDOW:], memory=memory, reset_memory=torch.tensor([False])).logits
        forgotten = model(ids[:, WINDOW:], memory=memory, reset_memory=torch.tensor([True])).logits
    assert_differ(kept, forgotten)


def test_resets_in_the_middle_of_windows_of_unequal_fill(model):
    """Five segments; each row begins new documents at places of its own."""
    lengths, resets = (5, 9, 3, 12, 4), ((1, 3), (2,), (1, 2, 3, 4))
    segments, memory, logits = [draw(3, length) for length in lengths], None, []
    with torch.no_grad():
        for i, ids in enumerate(segments):
            reset = torch.tensor([i in row for row in resets])
            output = model(ids, memory=memory, reset_memory=reset, return_memory=True)
            memory = output.memory
            logits.append(output.logits)
        for row, begins in enumerate(resets):
            borders = [0, *begins, len(lengths)]
            for begin, end in pairwise(borders):
                document = torch.cat([ids[row] for ids in segments[begin:end]])
                found = torch.cat([part[row] for part in logits[begin:end]])
                assert_near(found, model(document[None]).logits[0])


def test_memory_is_a_value(model):
    """Read twice it gives the same twice, and stays what it was."""
    ids = draw(2, DOCUMENT)
    with torch.no_grad():
        memory = model(ids[:, :13], return_memory=True).memory
        copies = [tensor.clone() for tensor in tensors(memory)]
        once, twice = (model(ids[:, 13:], memory=memory, return_memory=True) for _ in range(2))
        model(ids[:, 13:], memory=memory, reset_memory=torch.tensor([True, False]))
    assert_equal(once.logits, twice.logits)
    assert_equal(tensors(once.memory), tensors(twice.memory))
    assert_equal(tensors(memory), copies)
    pairs = zip(copies, tensors(once.memory), strict=True)
    assert not all(torch.equal(before, after) for before, after in pairs)


def places_of(cache, ragged):
    """Where the tensors of a memory lie; but a side layer of a Memorizing Transformer, which counts
    in tokens, makes its window anew where rows stand at different slots."""
    held = [item for layer in cache.layers for item in layer.memory._asdict().items()]
    return [t.data_ptr() for name, t in held if not (ragged and name.startswith("side_"))]


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_token_is_written_behind_its_window_and_copies_nothing(model, padded):
    """The buffers of a cache stay where they are; who took a copy or a value of it keeps that."""
    cache, length = MelodiCache(model.config), model.config.window_length
    ids = draw(2, length + 4)
    mask = torch.ones(2, length + 2).long()
    mask[0, 0] = not padded  # then rows stand at different slots
    model(ids[:, : length + 2], attention_mask=mask, cache=cache)
    twin, before = cache.clone(), [layer.memory for layer in cache.layers]
    places = places_of(cache, padded)
    for one in ids[:, length + 2 :].split(1, dim=1):
        found = model(one, cache=cache).logits
    assert len(before) == len(cache.layers)  # nothing that was held before is freed meanwhile
    assert places_of(cache, padded) == places
    wanted = model(ids[:, length + 2 :], cache=twin).logits
    assert_near(found, wanted[:, -1:])
    with torch.enable_grad():  # nothing is written to that a graph may need
        model(ids[:, :1], cache=cache).logits.sum().backward()


def test_returned_memory_is_detached(model):
    output = model(draw(2, DOCUMENT), return_memory=True)
    assert output.logits.requires_grad
    assert not any(tensor.requires_grad for tensor in tensors(output.memory))


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "melodi_no_memory"])
def test_training_carries_as_many_numbers_as_the_config_says(name):
    model = build(name)
    is_melodi = name.startswith("melodi")
    with torch.no_grad():
        for length in (WINDOW, 4 * WINDOW):
            memory = model(draw(2, length), return_memory=True).memory
            held = sum(tensor.numel() for tensor in tensors(memory.layers)) // 2
            given = {"as_tokens": True} if is_melodi else {}
            assert held == model.config.memory_floats(**given) + unfinished(model.config)


def unfinished(config):
    """Numbers of the windows of a segment that is not remembered before it is read."""
    windows = getattr(config, "segment_windows", 1) - 1
    return 2 * windows * config.window_length * config.num_attention_heads * config.head_dim


@pytest.mark.parametrize("name", SYSTEMS)
def test_generation_holds_what_the_config_says_and_the_open_window(name):
    model = build(name)
    cache = MelodiCache(model.config)
    with torch.no_grad():
        model(draw(2, DOCUMENT), cache=cache)
    if not name.startswith("melodi"):
        assert cache.memory_bytes() == 2 * held_bytes(model.config, 4)
        return
    held, config = cache.memory_bytes() // (2 * 4), model.config
    per_head = config.num_attention_heads * config.head_dim
    slots = config.num_short_memory_tokens + config.window_length
    window = 2 * slots * per_head + config.window_length * config.hidden_size
    assert held == config.memory_floats() + config.num_hidden_layers * window


@pytest.mark.parametrize("name", EACH)
def test_memory_and_time_do_not_grow_with_the_document(name):
    """After 50,000 tokens as after 1,000."""
    sizes = {"window_length": 256, "num_hidden_layers": 2, "hidden_size": 8, "head_dim": 4}
    one = {"logits_to_keep": 1}
    model, segment = build(name, **sizes), draw(1, 1024)
    caches = MelodiCache(model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for cache in caches:
            model(segment[:, :1000], cache=cache, **one)
        early = [memory_bytes(cache) for cache in caches]
        for _ in range(48):
            model(segment, cache=caches[0], **one)
        for _ in range(24):
            model(segment.repeat(1, 2), cache=caches[1], **one)
        seconds = {cache: [] for cache in (MelodiCache(model.config), caches[0])}
        for _ in range(7):  # in turn, so that a busy machine slows both
            for cache, spent in seconds.items():
                began = time.process_time()
                model(segment, cache=cache, **one)
                spent.append(time.process_time() - began)
    assert caches[0].memory_bytes() == early[0] == early[1] == memory_bytes(caches[1])
    assert int(caches[0].layers[0].progress.tokens_read) > 50_000
    begun, late = (median(spent) for spent in seconds.values())
    assert late <= 1.5 * begun


def test_a_cache_can_be_reset_and_copied(model):
    ids, cache = draw(2, DOCUMENT + 6), MelodiCache(model.config)
    first, second = ids[:, :DOCUMENT], ids[:, DOCUMENT:]
    with torch.no_grad():
        begun = model(first, cache=cache).logits
        copied = copy.deepcopy(cache)
        continued = model(second, cache=cache).logits
        assert_equal(model(second, cache=copied).logits, continued)
        cache.reset()
        assert_equal(model(first, cache=cache).logits, begun)


@pytest.mark.parametrize("name", EACH)
def test_a_cache_in_another_type_keeps_its_counters(name):
    model, ids = build(name), draw(2, DOCUMENT + 6)
    cache = MelodiCache(model.config)
    with torch.no_grad():
        model(ids[:, :DOCUMENT], cache=cache)
        cache.to(torch.float64)
        double = model.double()(ids[:, DOCUMENT:], cache=cache).logits
        assert_near(double, model(ids).logits[:, DOCUMENT:])
    assert {tensor.dtype for layer in cache.layers for tensor in layer.memory} == {torch.float64}
    assert {layer.progress.tokens_read.dtype for layer in cache.layers} == {torch.int64}


@pytest.mark.parametrize("name", EACH)
def test_a_detached_cache_cuts_the_graph(name):
    model, cache = build(name), MelodiCache(build(name).config)
    model(draw(1, DOCUMENT), cache=cache)
    held = [tensor for layer in cache.layers for tensor in layer.memory]
    assert any(tensor.requires_grad for tensor in held)
    with pytest.raises(ValueError, match=r"with a graph .* cache.detach_\(\) .*cache.clone\(\)"):
        copy.deepcopy(cache)
    clone, following = cache.clone(), draw(1, 3)
    held = [
        tensor
        for each in (cache.detach_(), clone)
        for layer in each.layers
        for tensor in layer.memory
    ]
    assert not any(tensor.requires_grad for tensor in held)
    with torch.no_grad():
        wanted = model(following, cache=copy.deepcopy(cache)).logits
        assert_equal(model(following, cache=clone).logits, wanted)
