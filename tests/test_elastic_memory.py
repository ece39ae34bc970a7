"""Elastic Memory equals its twin, its points can be exchanged, and its state is exact."""

import pytest
import torch

from melodi_hf import (
    ElasticMemoryConfig,
    ElasticMemoryForCausalLM,
    MelodiCache,
)
from melodi_hf.models import legs
from melodi_hf.models.meliad import to_meliad

from .cases import every_case
from .models import (
    DOCUMENT,
    WINDOW,
    assert_differ,
    assert_equal,
    assert_near,
    build,
    build_config,
    changed,
    draw,
)
from .parity_report import gradients, read_segment
from .references import blocks
from .references import elastic_memory as twin
from .test_parity import float64, random_model, sizes_of  # noqa: F401

TINY = {
    "vocab_size": 23,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 4,
    "intermediate_size": 10,
    "window_length": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "memory_layers": (1,),
    "memory_order": 5,
    "num_memory_samples": 3,
}
CHANGES = {
    "uniform": {},
    "exponential": {"sampling": "exponential"},
    "memory in every layer": {"memory_layers": (0, 1), "sampling": "exponential"},
    "more coefficients than tokens": {"memory_order": 9},
    "more points than coefficients": {"num_memory_samples": 7},
    "sliding": {"other_layers": "sliding"},
    "empty memory attended": {"other_layers": "sliding", "mask_empty_memory": False},
}


def twin_sizes(config):
    return sizes_of(config) | {
        "memory_layers": config.layers_with_memory,
        "order": config.memory_order,
        "samples": config.num_memory_samples,
        "sampling": config.sampling,
        "sliding": config.other_layers == "sliding",
    }


def twin_coefficients(state, name, layer_idx, config):
    """Of the closed blocks of each row, by direct projection."""
    rows = []
    for read, past in zip(state["tokens_read"], state[name.format(layer_idx)], strict=True):
        closed = past[: int(read) - int(read) % config.window_length].flatten(1)
        empty = past.new_zeros(config.memory_order, closed.shape[1])
        rows.append(twin.project(closed, config.memory_order) if len(closed) else empty)
    return torch.stack(rows)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("lengths", [(8, 8, 8), (5, 2, 9)], ids=["blocks", "any length"])
@pytest.mark.usefixtures("float64")
def test_model_equals_its_twin(change, lengths):
    """Logits, memory and gradients of three segments, of which row 1 begins two documents."""
    config = ElasticMemoryConfig(**TINY | CHANGES[change])
    model = random_model(ElasticMemoryForCausalLM, config)
    parameters = to_meliad(dict(model.named_parameters()), config)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    memory, state = None, {}
    for segment, length in enumerate(lengths):
        ids = torch.randint(config.vocab_size, (2, length))
        start = torch.tensor([segment == 0, segment in (0, 2)])
        output, xs, _ = read_segment(model, ids, memory, start)
        given = parameters, twin_sizes(config), state, ids, start, config.mask_empty_memory
        twins = blocks.read_segment(twin, *given)
        memory, state = output.memory, {name: t.detach() for name, t in twins["state"].items()}
        model.zero_grad()
        output.loss.backward()
        entropy = blocks.next_token_loss(twins["logits"], ids)
        gradient = torch.autograd.grad(entropy, list(parameters.values()), materialize_grads=True)
        coefficients = [
            (memory.layers[i][field], twin_coefficients(state, name, i, config))
            for i in config.layers_with_memory
            for field, name in enumerate((twin.KEYS, twin.VALUES))
        ]
        for ours, theirs in (
            (output.logits, twins["logits"]),
            (output.hidden_states[-1], twins["hidden"]),
            (xs, twins["xs"]),
            (output.loss, entropy),
            (gradients(model), dict(zip(parameters, gradient, strict=True))),
            *coefficients,
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_memory_changes_nothing_but_later_blocks():
    """With a memory and without, a model has the same parameters."""
    model, plain = build("elastic_memory"), build("elastic_memory", memory_layers=())
    plain.load_state_dict(model.state_dict())
    ids = draw(2, DOCUMENT)
    with torch.no_grad():
        with_memory, without = model(ids).logits, plain(ids).logits
        assert_near(with_memory[:, :WINDOW], without[:, :WINDOW])
        assert (with_memory - without)[:, WINDOW:].abs().amax(-1).min() > 1e-4
        alone = plain(ids[:, WINDOW : 2 * WINDOW]).logits
        assert_near(without[:, WINDOW : 2 * WINDOW], alone)


def test_every_third_layer_has_a_memory_unless_told_otherwise():
    config = ElasticMemoryConfig()
    assert config.layers_with_memory == (2, 5, 8, 11)
    names = [type(layer).__name__ for layer in build("elastic_memory").model.layers]
    assert names == ["SlidingWindowLayer", "ElasticMemoryLayer", "SlidingWindowLayer"]


# Sampling


def test_sampling_is_exchanged_and_exchanged_back():
    model, ids = build("elastic_memory"), draw(2, DOCUMENT)
    with torch.no_grad():
        read = {}
        for sampling in ("uniform", "exponential", "uniform", lambda m, _: torch.ones(m) / 2):
            model.set_sampling(sampling)
            read[sampling] = model(ids, return_memory=True)
            if sampling == "uniform":
                first = read.setdefault("first", read[sampling])
                assert_equal(read[sampling].logits, first.logits)
                continue
            assert_differ(read[sampling].logits, first.logits)
            # The layer below the memory and all it takes in are as they were.
            found, wanted = read[sampling].memory.layers[1], first.memory.layers[1]
            assert_equal(found.key_coefficients, wanted.key_coefficients)
            assert_equal(found.value_coefficients, wanted.value_coefficients)


def test_a_new_sampling_is_that_of_a_model_built_with_it(tmp_path):
    model, built = build("elastic_memory"), build("elastic_memory", sampling="exponential")
    ids = draw(1, DOCUMENT)
    model.set_sampling("exponential")
    model.save_pretrained(tmp_path)
    loaded = ElasticMemoryForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.sampling == "exponential"
    with torch.no_grad():
        wanted = built(ids).logits
        assert_equal(model(ids).logits, wanted)
        assert_equal(loaded(ids).logits, wanted)


@torch.no_grad()
def test_a_memory_file_can_be_looked_at_in_another_way(tmp_path):
    """From the next block that begins."""
    model, other = build("elastic_memory"), build("elastic_memory", sampling="exponential")
    ids, cache = draw(1, DOCUMENT + WINDOW), MelodiCache(model.config)
    first, second = ids[:, : 3 * WINDOW], ids[:, 3 * WINDOW :]
    model(first, cache=cache)
    cache.save(tmp_path / "book", model=model)
    found = {}
    for name, reader in {"same": model, "other": other}.items():
        loaded = MelodiCache.load(tmp_path / "book", model=reader)
        found[name] = reader(second, cache=loaded).logits
    assert_equal(found["same"], model(second, cache=cache).logits)
    assert_differ(found["other"], found["same"])
    wider = build("elastic_memory", memory_order=8)
    with pytest.raises(ValueError, match=r"memory_order=7 and this one has memory_order=8"):
        MelodiCache.load(tmp_path / "book", model=wider)


def test_samplings_that_cannot_work():
    model, ids = build("elastic_memory"), draw(1, DOCUMENT)
    with pytest.raises(ValueError, match="sampling is 'random': give one of 'uniform', 'expon"):
        model.set_sampling("random")
    for points in (
        lambda m, _: torch.zeros(m),
        lambda m, _: torch.full((m,), 1.5),
        lambda m, _: torch.ones(m + 1),
    ):
        model.set_sampling(points)
        with pytest.raises(ValueError, match="must give num_memory_samples=5 numbers greater"):
            model(ids)


# The state


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_coefficients_stay_float32_in_a_model_of_halves(how):
    """They are those of float32 up to the rounding of keys and values, which does not add up."""
    model, ids = build("elastic_memory", window_length=2), draw(1, 128)
    cache, half = MelodiCache(model.config), MelodiCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
        if how == "weights":
            model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            for piece in ids.split(2, dim=1):
                model(piece, cache=half)
    exact, held = (each.to_memory(model).layers[1] for each in (cache, half))
    for field in ("key_coefficients", "value_coefficients"):
        found, wanted = getattr(held, field), getattr(exact, field)
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float())
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_a_token_of_the_first_block_is_remembered_after_many():
    model, ids = build("elastic_memory", memory_order=64, num_memory_samples=64), draw(1, 80)
    with torch.no_grad():
        difference = model(ids).logits - model(changed(ids, 0, 3)).logits
    assert difference[0, 9 * WINDOW :].abs().amax(-1).min() > 1e-6


def test_a_part_of_the_past_cannot_be_kept():
    model = build("elastic_memory", memory_layers=(0, 2), other_layers="sliding")
    memory = model(draw(1, 2 * WINDOW), return_memory=True).memory
    with pytest.raises(
        ValueError, match=r"long=1 windows to keep, but .* summary of the whole past"
    ):
        model.base_model.forget(memory, long=1)
    emptied = model.base_model.forget(memory, long=0).layers[0]
    assert emptied.key_coefficients.abs().max() == emptied.value_coefficients.abs().max() == 0


@torch.no_grad()
def test_what_was_forgotten_is_a_past_of_zeros():
    """Time goes on: what is read later lies where it would lie."""
    model, ids = build("elastic_memory", memory_layers=(0,)), draw(2, 5 * WINDOW)
    before = model(ids[:, : 2 * WINDOW], return_memory=True).memory
    emptied = model.base_model.forget(before, long=0)
    whole, rest = (
        model(ids[:, 2 * WINDOW :], memory=memory, return_memory=True)
        for memory in (before, emptied)
    )
    past = legs.transition(
        torch.tensor(2 * WINDOW), 3 * WINDOW, legs.gauss_legendre_nodes(7)
    ).past.float()
    for found, all_of_it, lost in zip(
        *(read.layers[0][:2] for read in (rest.memory, whole.memory, before)), strict=True
    ):
        assert_near(found, all_of_it - past @ lost)
        assert_differ(found, all_of_it)
    alone = model(ids[:, 2 * WINDOW :]).logits
    assert_near(rest.logits[:, :WINDOW], alone[:, :WINDOW])
    assert_differ(rest.logits[:, WINDOW:], alone[:, WINDOW:])  # half of the past is zeros


def test_gradients_flow_through_the_coefficients_within_a_call_alone():
    model, ids = build("elastic_memory"), draw(1, 3 * WINDOW)
    model.get_input_embeddings().weight.requires_grad_(False)
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embedded).logits[:, -1].sum().backward()
    assert (embedded.grad[0, : 2 * WINDOW].abs().amax(-1) > 0).all()
    memory = model(ids, return_memory=True).memory
    assert not any(t.requires_grad for layer in memory.layers for t in layer)


# Banks


def test_rows_at_the_same_block_share_a_bank_and_so_do_layers(monkeypatch):
    monkeypatch.setattr(legs, "BANKS", legs.LruCache(legs.CACHE_BYTES))
    made, transition = [], legs.transition

    def counted(tokens_read, *sizes):
        made.append(tokens_read.tolist())
        return transition(tokens_read, *sizes)

    monkeypatch.setattr(legs, "transition", counted)
    model, ids = build("elastic_memory", memory_layers=(0, 1, 2)), draw(4, 2 * WINDOW)
    with torch.no_grad():
        memory = model(ids, return_memory=True).memory
        assert made == [0, WINDOW]
        rows = torch.tensor([True, False, True, False])
        model(ids, memory=memory, reset_memory=rows)
    assert made == [0, WINDOW, 2 * WINDOW, 3 * WINDOW]


def test_a_graph_of_ones_own_banks_equals_the_kept_ones():
    """Rows of a compiled graph stand anywhere: their banks are computed at once."""
    read = torch.tensor([0, 8, 800, 1_000_000])
    known = legs.gauss_legendre_nodes(7)
    together = legs.transition(read, 8, known)
    for row, tokens in enumerate(read.tolist()):
        alone = legs.cached_transition(tokens, 8, known, like=torch.zeros(1))
        assert_near(together.past[row].float(), alone.past, atol=1e-7)
        assert_near(together.block[row].float(), alone.block, atol=1e-7)


@every_case(
    ("field", "value", "message"),
    [
        ("memory_order", 0, "memory_order is 0: it must be 1 or more"),
        ("num_memory_samples", 0, "num_memory_samples is 0: it must be 1 or more"),
        ("sampling", "even", "sampling is 'even': it must be one of uniform, exponential"),
        ("other_layers", "all", "other_layers is 'all': it must be one of block, sliding"),
        ("memory_layers", (3,), r"memory_layers \[3\] do not exist: the model has 3 layers"),
        ("memory_layers", (1, 1), r"memory_layers \[1, 1\] names a layer twice"),
    ],
)
def test_sizes_that_cannot_work(field, value, message):
    with pytest.raises(ValueError, match=message):
        build_config("elastic_memory", **{field: value})
