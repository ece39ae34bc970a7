"""The memory reaches across windows, forgets what it should, is a value, and never grows."""

import copy
import time
from itertools import pairwise
from statistics import median

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from melodi_hf import MelodiCache

from .models import (
    DOCUMENT,
    EACH,
    FEW,
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
    tensors_of,
    tokens_read,
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
    difference = effect(build("melodi_no_short", long_memory_layers=()), 3, 3 * WINDOW)
    assert_equal(difference[WINDOW:], torch.zeros(2 * WINDOW))
    assert (difference[3:WINDOW] > 1e-4).all()


def test_transformer_xl_sees_one_window_per_layer_and_no_token_more():
    difference = effect(build("transformer_xl"), 0, 4 * WINDOW)
    reach = TINY["num_hidden_layers"] * WINDOW
    assert difference[reach] > 0
    assert_equal(difference[reach + 1 :], torch.zeros(WINDOW - 1))


@pytest.mark.parametrize(
    "changes", [{}, {"num_short_memory_tokens": 0}, {"long_memory_layers": ()}], ids=str
)
def test_an_emptied_memory_has_no_effect(changes):
    """The opposite of reaching across windows: what reaches is in the memory and nowhere else."""
    model, ids = build("melodi", **changes), draw(2, 2 * WINDOW)
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


@pytest.mark.parametrize(
    "changes", [{}, {"num_short_memory_tokens": 0}, {"long_memory_capacity": 5}], ids=str
)
def test_the_queue_fills_from_its_newest_end(changes):
    model, ids = build("melodi", **changes), draw(2, 2 * WINDOW)
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


def test_reset_memory_forgets_in_its_rows_alone(model):
    """Between windows and within one, in training and in generation."""
    reset = torch.tensor([False, True, False])
    for length, carrier in ((WINDOW, "memory"), (WINDOW + 5, "memory"), (WINDOW + 5, "cache")):
        ids, cache = draw(3, length + DOCUMENT), MelodiCache(model.config)
        first, second = ids[:, :length], ids[:, length:]
        with torch.no_grad():
            if carrier == "cache":
                model(first, cache=cache)
                carried = {"cache": cache}
            else:
                carried = {"memory": model(first, return_memory=True).memory}
            logits = model(second, reset_memory=reset, **carried).logits
            whole, fresh = model(ids).logits[:, length:], model(second).logits
        assert_near(logits[~reset], whole[~reset])
        assert_near(logits[reset], fresh[reset])


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


@pytest.mark.parametrize("name", EACH)
@torch.no_grad()
def test_a_token_is_written_behind_its_window_and_copies_nothing(name):
    """The buffers of a cache stay where they are; who took a copy keeps what it holds."""
    model = build(name)
    for padded in (False, True):
        cache, length = MelodiCache(model.config), model.config.window_length
        ids = draw(2, length + 4)
        mask = torch.ones(2, length + 2).long()
        mask[0, 0] = not padded  # then rows stand at different slots
        model(ids[:, : length + 2], attention_mask=mask, cache=cache)
        twin, before = cache.clone(), tensors_of(cache)  # held, so that no place is used again
        for one in ids[:, length + 2 :].split(1, dim=1):
            found = model(one, cache=cache).logits
        assert [t.data_ptr() for t in tensors_of(cache)] == [t.data_ptr() for t in before]
        wanted = model(ids[:, length + 2 :], cache=twin).logits
        assert_near(found, wanted[:, -1:])
        with torch.enable_grad():  # nothing is written to that a graph may need
            model(ids[:, :1], cache=cache).logits.sum().backward()


@pytest.mark.parametrize("name", EACH)
def test_returned_memory_is_detached(name):
    model = build(name)
    output = model(draw(2, DOCUMENT), return_memory=True)
    assert output.logits.requires_grad
    assert not any(tensor.requires_grad for tensor in tensors(output.memory))


@pytest.mark.parametrize("name", SYSTEMS)
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
        assert cache.memory_bytes() == 2 * model.config.cache_bytes(4)
        return
    held, config = cache.memory_bytes() // (2 * 4), model.config
    per_head = config.num_attention_heads * config.head_dim
    slots = config.num_short_memory_tokens + config.window_length
    window = 2 * slots * per_head + config.window_length * config.hidden_size
    assert held == config.memory_floats() + config.num_hidden_layers * window


@pytest.mark.parametrize("name", EACH)
def test_memory_and_time_do_not_grow_with_the_document(name):
    """After 16,000 tokens as after 600: keys and values of all windows would be 25 times more."""
    sizes = {"window_length": 64, "num_hidden_layers": 2, "hidden_size": 8, "head_dim": 4}
    one = {"logits_to_keep": 1}
    model, segment = build(name, **sizes), draw(1, 640)
    cache = MelodiCache(model.config)
    with torch.no_grad():
        model(segment[:, :600], cache=cache, **one)
        early = cache.memory_bytes()
        for _ in range(25):
            model(segment, cache=cache, **one)
        seconds = {cache: [] for cache in (MelodiCache(model.config), cache)}
        for _ in range(7):  # in turn, so that a busy machine slows both
            for each, spent in seconds.items():
                began = time.process_time()
                model(segment, cache=each, **one)
                spent.append(time.process_time() - began)
    assert cache.memory_bytes() == early
    assert cache.get_seq_length() > 16_000
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
    assert {tensor.dtype for tensor in tensors_of(cache)} == {torch.float64}
    assert tokens_read(cache).dtype == torch.int64


@pytest.mark.parametrize("name", FEW)
def test_a_detached_cache_cuts_the_graph(name):
    model, cache = build(name), MelodiCache(build(name).config)
    model(draw(1, DOCUMENT), cache=cache)
    assert any(tensor.requires_grad for tensor in tensors_of(cache))
    with pytest.raises(ValueError, match=r"with a graph .* cache.detach_\(\) .*cache.clone\(\)"):
        copy.deepcopy(cache)
    clone, following = cache.clone(), draw(1, 3)
    for each in (cache.detach_(), clone):
        assert not any(tensor.requires_grad for tensor in tensors_of(each))
    with torch.no_grad():
        wanted = model(following, cache=copy.deepcopy(cache)).logits
        assert_equal(model(following, cache=clone).logits, wanted)
