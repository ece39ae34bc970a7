"""Looking at a memory: blocks, rows and places change nothing; the nearest are found; what is kept
for backward does not grow with the windows."""

import sys

import pytest
import torch

from melodi_hf import MelodiCache, MemorizingTransformerConfig
from melodi_hf.models import faiss_search, retrieval
from melodi_hf.models.retrieval import (
    NOWHERE,
    Source,
    attend_to_nearest,
    attend_to_places,
    find_nearest,
)

from . import peak_memory
from .models import DOCUMENT, WINDOW, assert_differ, assert_equal, assert_near, build, draw

HEADS, CHANNELS, ROWS = 2, 5, 3
NEEDS_FAISS = pytest.mark.skipif(faiss_search.faiss is None, reason="faiss is not installed")


@pytest.fixture(params=[1, 7, 2**24], ids=["by one", "some", "at once"])
def block(request, monkeypatch):
    """How many scores a block may have: fewer than one per query is one key at a time."""
    monkeypatch.setattr(retrieval, "BLOCK", request.param * ROWS * HEADS)


def sources():
    """Two, of three rows; in the first, row 1 has an empty slot and row 2 two of padding."""
    first = torch.tensor([[3, 4, 5, 6], [-1, 0, 1, 2], [7, 8, NOWHERE, NOWHERE]])
    second = torch.tensor([[7, 8, 9], [3, 4, 5], [9, 10, 11]])
    return [
        Source(
            torch.randn(ROWS, HEADS, places.shape[1], CHANNELS).double().requires_grad_(),
            torch.randn(ROWS, HEADS, places.shape[1], CHANNELS).double().requires_grad_(),
            places,
        )
        for places in (first, second)
    ]


def naively(q, given, low, high, rows=None, nearest=None):
    """Query by query, over those keys alone that it sees -> values, and the scores' logarithms."""
    out, log_sum = torch.zeros_like(q), q.new_zeros(q.shape[:3])
    for i, row in enumerate(range(len(q)) if rows is None else rows.tolist()):
        for h in range(HEADS):
            keys = torch.cat([source.keys[row, h] for source in given])
            values = torch.cat([source.values[row, h] for source in given])
            places = torch.cat([source.places[row] for source in given])
            for t in range(q.shape[2]):
                seen = (places >= low[i].expand(q.shape[2])[t]) & (
                    places < high[i].expand(q.shape[2])[t]
                )
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


@pytest.mark.parametrize("rows", [None, [2, 0]], ids=["all rows", "some rows"])
@pytest.mark.usefixtures("block")
def test_attention_to_places_is_softmax_over_what_is_seen(rows):
    torch.manual_seed(0)
    given, rows = sources(), None if rows is None else torch.tensor(rows)
    count = ROWS if rows is None else len(rows)
    q = torch.randn(count, HEADS, 4, CHANNELS).double().requires_grad_()
    high = torch.tensor([[4, 6, 8, 9], [1, 1, 3, 5], [8, 9, 10, 11]])
    low = torch.tensor([[0], [-1], [8]])
    low, high = (low, high) if rows is None else (low[rows], high[rows])
    found = attend_to_places(q, given, low, high, rows)
    wanted = naively(q, given, low, high, rows)
    sees = wanted[1] != 0
    assert not sees.all()  # row 2 begins where it may not look yet
    assert_near(found.values, wanted[0], atol=1e-6)
    assert_near(found.log_sum[sees].double(), wanted[1][sees], atol=1e-5)
    found = found._replace(log_sum=found.log_sum.where(sees, 0))
    for ours, theirs in zip(pulled(found, given, q), pulled(wanted, given, q), strict=True):
        assert_near(ours, theirs, atol=1e-5)
        assert theirs.abs().max() > 0.01


@pytest.mark.parametrize("rows", [None, [2, 0]], ids=["all rows", "some rows"])
@pytest.mark.parametrize("count", [1, 3, 99])
@pytest.mark.usefixtures("block")
def test_the_nearest_are_found_and_attended_to(rows, count):
    torch.manual_seed(0)
    given, rows = sources(), None if rows is None else torch.tensor(rows)
    q = torch.randn(ROWS if rows is None else len(rows), HEADS, 4, CHANNELS)
    q = q.double().requires_grad_()
    low, high = torch.tensor([[3], [0], [7]]), torch.tensor([[8], [3], [11]])
    low, high = (low, high) if rows is None else (low[rows], high[rows])
    index = find_nearest(q, given, low, high, count, rows)
    assert index.shape[-1] == min(count, 7)
    found = attend_to_nearest(q, given, index, rows)
    values, log_sum = naively(q, given, low, high, rows, nearest=count)
    assert_near(found.values, values, atol=1e-6)
    assert_near(found.log_sum.double(), log_sum, atol=1e-5)
    ours, *others = pulled(found, given, q)
    assert_near(ours, pulled((values, log_sum), given, q)[0], atol=1e-5)
    assert all((gradient == 0).all() for gradient in others)  # what is remembered is a constant


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
    """How many indices were built, as it goes."""
    count = []
    build_one = faiss_search.FaissSearch._built

    def counted(self, keys):
        count.append(len(keys))
        return build_one(self, keys)

    monkeypatch.setattr(faiss_search.FaissSearch, "_built", counted)
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
    "placement is 'top': it is 'in_stack' or 'side'": {"placement": "top"},
    "num_retrieved is 0: it must be 1 or more": {"num_retrieved": 0},
    "segment_windows is 8: a memory layer in the stack": {"segment_windows": 8},
    "faiss_index is 'Flat' and retrieval 'dense'": {"retrieval": "dense", "faiss_index": "Flat"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_choices_that_cannot_work_are_refused(message):
    with pytest.raises(ValueError, match=message):
        MemorizingTransformerConfig(**REFUSED[message])


@torch.no_grad()
@pytest.mark.parametrize("name", ["memorizing_transformer", "memorizing_transformer_side"])
def test_figures_tell_how_full_the_memory_is(name):
    model = build(name, memory_length=3 * WINDOW, memory_combination="gate")
    slots = model.config.memory_slots // WINDOW
    told = [
        model.model.figures(model(draw(1, windows * WINDOW), return_memory=True).memory)
        for windows in (1, 2, 9)
    ]
    place = model.config.memory_layer
    fill = [float(figures[f"queue_fill/{place}"]) for figures in told]
    assert fill == pytest.approx([1 / slots, 2 / slots, 1])
    rms = [float(figures[f"queue_rms/{place}"]) for figures in told]
    assert max(rms) < 2 * min(rms)  # of the tokens that are there
    assert all(0.3 < figures[f"gate_openness/{place}"] < 0.7 for figures in told)


def saved_for_backward(model, ids):
    """Bytes of all tensors that backward will want, each storage once, of a second segment."""
    memory = model(ids, return_memory=True).memory
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, memory=memory, labels=ids, return_memory=True).loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize(
    "name",
    ["memorizing_transformer", "memorizing_transformer_joint", "memorizing_transformer_side"],
)
def test_backward_keeps_the_memory_once_and_nothing_for_each_pair(name):
    """Whatever the number of windows: not a copy for each, nor queries times entries."""
    ids = draw(1, 4 * WINDOW)
    short, long = (
        saved_for_backward(build(name, memory_length=length).train(), ids)
        for length in (20 * WINDOW, 100 * WINDOW)
    )
    config = build(name).config
    entry = 2 * 4 * config.num_attention_heads * config.head_dim + 8  # and the place of it
    # But for scalars, which may lie where another was before.
    assert abs(long - short - 80 * WINDOW * entry) < entry


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
@pytest.mark.parametrize("name", peak_memory.MODELS)
def test_65536_entries_are_trained_in_bounded_memory(name):
    """The memory that comes of it, and what it is put together in: less than a copy for each
    window would take, let alone queries times entries."""
    small, large = (peak_memory.measure(name, length) for length in (1024, 65536))
    entries, blocks = peak_memory.memory_bytes(name, 65536), 6 * 4 * peak_memory.BLOCK
    bound = 3 * entries + blocks
    assert large - small < bound < peak_memory.SEGMENT_WINDOWS * entries
    assert bound < 0.1 * peak_memory.mask_bytes(65536)
