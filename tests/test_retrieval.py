"""Attention to a memory: blocks do not change results, the nearest keys are found, and the
tensors saved for backward do not grow with the windows."""

import sys

import pytest
import torch

from melodi_hf import MelodiCache, MemorizingTransformerConfig
from melodi_hf.models import faiss_search, retrieval
from melodi_hf.models.retrieval import (
    Source,
    attend_to_nearest,
    attend_to_range,
    find_nearest,
)

from . import peak_memory
from .cases import every_case
from .models import DOCUMENT, WINDOW, assert_differ, assert_equal, assert_near, build, draw

HEADS, CHANNELS, ROWS = 2, 5, 3
NEEDS_FAISS = pytest.mark.skipif(faiss_search.faiss is None, reason="faiss is not installed")


@pytest.fixture(params=[1, 7, 2**24], ids=["by one", "some", "at once"])
def block(request, monkeypatch):
    """How many scores a block may have: fewer than one per query is one key at a time."""
    monkeypatch.setattr(retrieval, "BLOCK", request.param * ROWS * HEADS)


def sources():
    """Two, of three rows; the first slot of row 1 is empty."""
    return [
        Source(
            torch.randn(ROWS, HEADS, length, CHANNELS).double().requires_grad_(),
            torch.randn(ROWS, HEADS, length, CHANNELS).double().requires_grad_(),
            torch.tensor(start),
        )
        for length, start in ((4, [3, -1, 5]), (3, [7, 3, 9]))
    ]


def naively(q, given, low, high, nearest=None):
    """Attend query by query to the keys in its range alone: values, and the log-sum-exp."""
    out, log_sum = torch.zeros_like(q), q.new_zeros(q.shape[:3])
    for i in range(len(q)):
        positions = torch.cat([int(s.start[i]) + torch.arange(s.keys.shape[2]) for s in given])
        for h in range(HEADS):
            keys = torch.cat([source.keys[i, h] for source in given])
            values = torch.cat([source.values[i, h] for source in given])
            for t in range(q.shape[2]):
                first, end = low[i].expand(q.shape[2])[t], high[i].expand(q.shape[2])[t]
                seen = (positions >= first) & (positions < end)
                scores = keys[seen] @ q[i, h, t]
                if nearest is not None:
                    scores, order = scores.sort(descending=True)
                    scores, order = scores[:nearest], order[:nearest]
                    out[i, h, t] = scores.softmax(0) @ values[seen][order]
                elif seen.any():
                    out[i, h, t] = scores.softmax(0) @ values[seen]
                if seen.any():
                    log_sum[i, h, t] = scores.logsumexp(0)
    return out, log_sum


def pulled(found, given, q):
    """Gradients of everything, by a loss in which both parts of what was found have a say."""
    values, log_sum = found
    loss = (values * torch.arange(CHANNELS)).sum() + (log_sum.double().sin()).sum()
    wanted = [q, *(tensor for source in given for tensor in source[:2])]
    return torch.autograd.grad(loss, wanted, materialize_grads=True)


@pytest.mark.usefixtures("block")
def test_attention_to_a_range_is_softmax_over_its_keys():
    torch.manual_seed(0)
    given = sources()
    q = torch.randn(ROWS, HEADS, 4, CHANNELS).double().requires_grad_()
    high = torch.tensor([[4, 6, 8, 9], [1, 1, 3, 5], [8, 9, 10, 11]])
    low = torch.tensor([[0], [-1], [8]])
    found = attend_to_range(q, given, low, high)
    wanted = naively(q, given, low, high)
    sees = wanted[1] != 0
    assert not sees.all()  # the range of the first query of row 2 is empty
    assert_near(found.values, wanted[0], atol=1e-6)
    assert_near(found.log_sum[sees].double(), wanted[1][sees], atol=1e-5)
    found = found._replace(log_sum=found.log_sum.where(sees, 0))
    for ours, theirs in zip(pulled(found, given, q), pulled(wanted, given, q), strict=True):
        assert_near(ours, theirs, atol=1e-5)
        assert theirs.abs().max() > 0.01


@pytest.mark.parametrize("count", [1, 3, 99])
@pytest.mark.usefixtures("block")
def test_the_nearest_are_found_and_attended_to(count):
    torch.manual_seed(0)
    given = sources()
    q = torch.randn(ROWS, HEADS, 4, CHANNELS).double().requires_grad_()
    low, high = torch.tensor([[3], [0], [7]]), torch.tensor([[8], [3], [11]])
    index = find_nearest(q, given, low, high, count)
    assert index.shape[-1] == min(count, 7)
    found = attend_to_nearest(q, given, index)
    values, log_sum = naively(q, given, low, high, nearest=count)
    assert_near(found.values, values, atol=1e-6)
    assert_near(found.log_sum.double(), log_sum, atol=1e-5)
    ours, *others = pulled(found, given, q)
    assert_near(ours, pulled((values, log_sum), given, q)[0], atol=1e-5)
    assert all((gradient == 0).all() for gradient in others)  # no gradient to the memory


SEARCHING = {
    "memorizing_transformer": {},
    "memorizing_transformer_side": {"retrieval": "top_k", "memory_combination": "gate"},
}


@torch.no_grad()
def test_all_of_the_memory_retrieved_is_all_of_it_attended_to():
    ids = draw(2, 2 * DOCUMENT)
    for name, changes in SEARCHING.items():
        masked = changes | {"mask_empty_memory": True}
        few = build(name, **masked)
        every = build(name, **masked, num_retrieved=12)
        dense = build(name, **masked | {"retrieval": "dense"})
        assert_near(every(ids).logits, dense(ids).logits)
        assert_differ(few(ids).logits, dense(ids).logits)


def built(monkeypatch):
    """Record the number of keys of each index that is built."""
    count = []
    build_one = faiss_search.FaissSearch._build

    def counted(self, keys):
        count.append(len(keys))
        return build_one(self, keys)

    monkeypatch.setattr(faiss_search.FaissSearch, "_build", counted)
    return count


@NEEDS_FAISS
@torch.no_grad()
@pytest.mark.parametrize("name", SEARCHING)
def test_an_index_of_all_keys_finds_what_exact_search_finds(name):
    ids, mask = draw(3, DOCUMENT), torch.rand(3, DOCUMENT) < 0.7
    changes = SEARCHING[name]
    exact, indexed = build(name, **changes), build(name, **changes, faiss_index="Flat")
    for how in ({}, {"attention_mask": mask.long()}):
        assert_near(indexed(ids, **how).logits, exact(ids, **how).logits)
    prompt = ids[:, :5]
    how = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 2 * WINDOW}
    assert_equal(indexed.generate(prompt, **how), exact.generate(prompt, **how))


@NEEDS_FAISS
@pytest.mark.parametrize("index", ["HNSW8", "IVF4,Flat"])
def test_other_indices_train_and_generate(index):
    model = build("memorizing_transformer", faiss_index=index).train()
    ids = draw(1, DOCUMENT)
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
    model.eval()
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4}
    assert model.generate(ids, **how).shape == (1, DOCUMENT + 4)


@NEEDS_FAISS
@torch.no_grad()
def test_an_index_is_built_once_for_each_content(monkeypatch):
    model, count = build("memorizing_transformer", faiss_index="Flat"), built(monkeypatch)
    ids, other = draw(1, 4 * WINDOW), draw(1, 4 * WINDOW)
    cache, another = MelodiCache(model.config), MelodiCache(model.config)
    heads = model.config.num_attention_heads
    for token in ids.split(1, dim=1):
        model(token, cache=cache)
    assert count == [WINDOW] * heads + [12] * 2 * heads  # windows 1, 2 and 3
    # Two documents in turn: each finds its own.
    wanted = model(torch.cat((ids, other[:, :3]), dim=1)).logits[:, -3:]
    model(other, cache=another)
    found = []
    for token in other[:, :3].split(1, dim=1):
        found.append(model(token, cache=cache).logits)
        model(token, cache=another)
    assert_near(torch.cat(found, dim=1), wanted)


def test_a_missing_faiss_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(faiss_search, "faiss", None)
    with pytest.raises(ValueError, match=r"'Flat' and faiss is not installed: pip install faiss"):
        build("memorizing_transformer", faiss_index="Flat")
    build("memorizing_transformer")


@NEEDS_FAISS
def test_an_index_that_faiss_does_not_know_is_refused():
    with pytest.raises(ValueError, match="'Nonsense', of which faiss cannot make an index"):
        build("memorizing_transformer", faiss_index="Nonsense")


REFUSED = {
    "memory_layer 12 does not exist: the model has 12 layers": {"memory_layer": 12},
    "placement is 'top': it must be one of in_stack, side": {"placement": "top"},
    "num_retrieved is 0: it must be 1 or more": {"num_retrieved": 0},
    "segment_windows is 8: a memory layer in the stack": {"segment_windows": 8},
    "faiss_index is 'Flat' and retrieval 'dense'": {"retrieval": "dense", "faiss_index": "Flat"},
}


@every_case("message", REFUSED)
def test_choices_that_cannot_work_are_refused(message):
    with pytest.raises(ValueError, match=message):
        MemorizingTransformerConfig(**REFUSED[message])


@torch.no_grad()
@pytest.mark.parametrize("name", ["memorizing_transformer", "memorizing_transformer_side"])
def test_metrics_measure_how_full_the_memory_is(name):
    model = build(name, memory_length=3 * WINDOW, memory_combination="gate")
    slots = model.config.memory_slots // WINDOW
    metrics = [
        model.model.metrics(model(draw(1, windows * WINDOW), return_memory=True).memory)
        for windows in (1, 2, 9)
    ]
    layer = model.config.memory_layer
    filled = [float(values[f"queue_fill/{layer}"]) for values in metrics]
    assert filled == pytest.approx([1 / slots, 2 / slots, 1])
    rms = [float(values[f"queue_rms/{layer}"]) for values in metrics]
    assert max(rms) < 2 * min(rms)  # of the tokens that are there
    assert all(0.3 < values[f"gate_openness/{layer}"] < 0.7 for values in metrics)


def saved_for_backward(model, ids):
    """Count the bytes of all tensors saved for backward of a second segment, each storage once."""
    memory = model(ids, return_memory=True).memory
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, memory=memory, labels=ids, return_memory=True).loss.backward()
    return sum(saved.values())


@pytest.mark.parametrize("name", ["memorizing_transformer", "memorizing_transformer_side"])
def test_backward_saves_the_memory_once_and_nothing_for_each_pair(name):
    """Not a copy for each window, nor a tensor of queries times entries."""
    ids = draw(1, 4 * WINDOW)
    short, long = (
        saved_for_backward(build(name, memory_length=length).train(), ids)
        for length in (20 * WINDOW, 100 * WINDOW)
    )
    config = build(name).config
    entry = 2 * 4 * config.num_attention_heads * config.head_dim
    # Except scalars, which may share storages.
    assert abs(long - short - 80 * WINDOW * entry) < entry


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
@pytest.mark.parametrize("name", peak_memory.MODELS)
def test_65536_entries_are_trained_in_bounded_memory(name):
    """The peak is below a copy of the memory per window, and far below queries times entries."""
    small, large = (peak_memory.measure(name, length) for length in (1024, 65536))
    entries, blocks = peak_memory.memory_bytes(name, 65536), 6 * 4 * peak_memory.BLOCK
    bound = 3 * entries + blocks
    assert large - small < bound < peak_memory.SEGMENT_WINDOWS * entries
    assert bound < 0.1 * peak_memory.mask_bytes(65536)
