"""Old memories are compressed as the paper says, and only what it says trains the compression."""

from functools import partial

import pytest
import torch

from melodi_hf import CompressiveTransformerConfig, CompressiveTransformerForCausalLM
from melodi_hf.models import kernels

from .cases import every_case
from .models import (
    WINDOW,
    assert_differ,
    assert_equal,
    assert_near,
    build,
    draw,
    read_with_cache,
)
from .references import blocks, compressive_transformer

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
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "compressed_memory_length": 3,  # it overflows within what a window leaves
}
SCALED = {"compressed_position": "scaled"}
LONGER = {"memory_length": 8, "compressed_memory_length": 4}
CHANGES = {
    "conv, attention": {},
    "conv, attention, two windows in memory": LONGER,
    "conv, attention, scaled positions": SCALED,
    "conv, autoencoding": {"compression_loss": "autoencoding"},
    "conv, through memory": {"compression_loss": "none"},
    "conv of four": {"compression_rate": 4, "compressed_memory_length": 1},
    "dilated, attention": {"compression": "dilated_conv"},
    "dilated, autoencoding": {"compression": "dilated_conv", "compression_loss": "autoencoding"},
    "dilated, through memory, two windows, scaled": {
        "compression": "dilated_conv", "compression_loss": "none", **LONGER, **SCALED,
    },
    "max": {"compression": "max_pool", "compression_loss": "none"},
    "mean": {"compression": "mean_pool", "compression_loss": "none", **SCALED},
    "most used": {"compression": "most_used", "compression_loss": "none"},
    "most used, two windows in memory": {
        "compression": "most_used", "compression_loss": "none", **LONGER,
    },
}  # fmt: skip
NAMES = ("num_buckets", "max_distance")
LEARNING = pytest.mark.parametrize("objective", ["attention", "autoencoding"])
FLAT = {"relative_attention_num_buckets": 2, "relative_attention_max_distance": 2}
SLOW = partial(pytest.param, marks=pytest.mark.slow)
OWN = (".compression.", ".reconstruction.")  # parameters that the auxiliary loss trains


@pytest.fixture
def float64(monkeypatch):
    """What the models compute in float32 for accuracy is computed in float64, like the rest."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(kernels, "QUERY_BLOCK", 3)
    monkeypatch.setattr(kernels, "CHUNK", 2 * TINY["vocab_size"])


def shaken(config):
    """In float64, all parameters drawn again: or biases would be zero and signs alike."""
    torch.manual_seed(0)
    model = CompressiveTransformerForCausalLM(config).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("float64")
def test_model_equals_its_twin(change):
    """Logits, losses, memories and gradients of three segments, of which row 1 begins two
    documents; the memories overflow."""
    config = CompressiveTransformerConfig(**TINY | CHANGES[change])
    model, sizes = shaken(config), config.to_dict() | {"memory_length": config.tokens_carried}
    sizes |= {f"t5_{name}": sizes[f"relative_attention_{name}"] for name in NAMES}
    params = {
        name.removeprefix("model."): p.detach().clone().requires_grad_()
        for name, p in model.named_parameters()
    }
    empty = [([], [])] * config.num_hidden_layers
    memory, states = None, [empty, empty]
    for segment, length in enumerate((12, 8, 18)):
        ids = torch.randint(config.vocab_size, (2, length))
        start = torch.tensor([segment == 0, segment == 2])
        output = model(ids, labels=ids, memory=memory, reset_memory=start, return_memory=True)
        memory = output.memory
        states = [empty if begins else s for begins, s in zip(start, states, strict=True)]
        rows = zip(states, ids, strict=True)
        rows = [compressive_transformer.read_row(params, sizes, *row) for row in rows]
        logits, states, losses = zip(*rows, strict=True)
        logits, entropy = torch.stack(logits), blocks.next_token_loss(torch.stack(logits), ids)
        lost = [each for row in losses for layer in row for each in layer]
        aux = sum(lost, torch.zeros(())) * config.window_length / ids[:, 1:].numel()
        assert_near(output.logits, logits, atol=1e-9)
        assert_near(output.loss, entropy + aux, atol=1e-9)
        if config.compression_loss == "none":
            assert output.aux_loss is None
        else:
            assert aux > 1e-3
            assert_near(output.aux_loss, aux, atol=1e-9)
        model.zero_grad()
        output.loss.backward()
        wanted = torch.autograd.grad(entropy + aux, list(params.values()), materialize_grads=True)
        for parameter, gradient in zip(model.parameters(), wanted, strict=True):
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert_near(found, gradient, atol=1e-9)
        states = [[tuple(map(detached, layer)) for layer in row] for row in states]
        for i, held in enumerate(memory.layers):
            for row, state in enumerate(states):
                for found, wanted in zip((held.memory, held.compressed), state[i], strict=True):
                    assert_near(found[row], padded(wanted, found[row]), atol=1e-9)
    assert len(states[0][0][1]) == config.slots_carried


def detached(states):
    return [state.detach() for state in states]


def padded(states, like):
    """The newest last, zeros before them."""
    return torch.stack([like.new_zeros(like.shape[1])] * (len(like) - len(states)) + states)


@LEARNING
def test_micro_batches_have_the_loss_of_the_batch(objective):
    """Also if rows have unequal numbers of targets, and of windows that are compressed."""
    model, ids = learning(objective), draw(4, 3 * WINDOW)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, 5:] = -100
    mask[1, 2 * WINDOW - 1 :] = 0
    labels[mask == 0] = -100
    whole = model(ids, labels=labels, attention_mask=mask)
    given = {"num_items_in_batch": (labels[:, 1:] != -100).sum()}
    rows = zip(ids.split(1), labels.split(1), mask.split(1), strict=True)
    parts = [model(x, labels=y, attention_mask=real, **given) for x, y, real in rows]
    assert_near(sum(part.loss for part in parts), whole.loss)
    assert_near(sum(part.aux_loss for part in parts), whole.aux_loss)


def learning(objective="attention", **changes):
    return build("compressive_transformer", compression_loss=objective, **changes).train()


def moved(model, value):
    """The names of the parameters that a value gives a gradient, and these."""
    model.zero_grad()
    value.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.clone() for name, grad in grads.items() if grad.abs().max() > 0}


@LEARNING
@every_case("kind", ["conv", "dilated_conv"])
def test_each_loss_trains_its_own_parameters_and_no_other(objective, kind):
    model, ids = learning(objective, compression=kind), draw(2, 4 * WINDOW)
    own = {name for name, _ in model.named_parameters() if any(part in name for part in OWN)}
    assert own
    output = model(ids, labels=ids)
    by_both = moved(model, output.loss)
    assert moved(model, model(ids).aux_loss).keys() == own
    by_task = moved(model, model.eval()(ids, labels=ids).loss)
    assert by_task.keys() == {name for name, _ in model.named_parameters()} - own
    assert by_both.keys() == by_task.keys() | own
    for name, gradient in by_task.items():  # the same as without the auxiliary loss
        assert_near(by_both[name], gradient, atol=1e-6)


@pytest.mark.parametrize("kind", ["conv", "dilated_conv"])
def test_without_a_loss_of_its_own_a_compression_learns_from_the_next_token(kind):
    model = learning("none", compression=kind)
    ids = draw(2, 3 * WINDOW)
    grads = moved(model, model(ids, labels=ids).loss)
    assert {name for name in grads if ".compression." in name}
    assert grads.keys() == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("change", "crosses"),
    [
        ({}, False),
        ({"compression_loss": "none"}, True),
        ({"compression_loss": "autoencoding"}, False),
        ({"compression": "mean_pool", "compression_loss": "none"}, False),
    ],
)
def test_gradients_cross_windows_only_where_they_must_train_the_compression(change, crosses):
    model, ids = build("compressive_transformer", **change).train(), draw(1, 4 * WINDOW)
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=x).logits[:, -1].square().sum().backward()
    assert (x.grad[:, -WINDOW:].abs().amax(-1) > 0).all()
    assert bool(x.grad[:, :WINDOW].abs().max() > 1e-6) == crosses
    assert_equal(x.grad[:, 2 * WINDOW : -WINDOW], torch.zeros(1, WINDOW, 32))  # in the memory


@LEARNING
def test_the_auxiliary_loss_is_computed_in_training_alone(objective):
    model, ids = learning(objective), draw(2, 4 * WINDOW)
    called = []
    for layer in model.model.layers:
        layer.reconstruction.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        assert model(ids, labels=ids).aux_loss is None
    output = model.eval()(ids, labels=ids)
    assert output.aux_loss is None
    assert not called
    trained = model.train()(ids, labels=ids)
    assert len(called) == 3 * 4  # layers, windows
    assert_near(trained.loss, output.loss + trained.aux_loss)
    assert trained.aux_loss > 1e-3


@LEARNING
def test_only_windows_that_send_something_out_of_the_memory_count(objective):
    model = learning(objective, memory_length=2 * WINDOW)
    ids = draw(1, 5 * WINDOW)
    assert model(ids[:, : 2 * WINDOW]).aux_loss == 0
    memory = model(ids[:, : 2 * WINDOW], return_memory=True).memory
    each = []
    for window in ids[:, 2 * WINDOW :].split(WINDOW, dim=1):
        output = model(window, memory=memory, return_memory=True)
        memory = output.memory
        each.append(output.aux_loss)
    assert_near(model(ids).aux_loss, sum(each), atol=1e-4)
    assert_differ(each[0], each[1])


@LEARNING
@pytest.mark.parametrize("pieces", [[5, 9, 3, 12, 11], [13, 27], [1] * 40], ids=str)
def test_the_auxiliary_loss_does_not_depend_on_where_a_document_is_cut(objective, pieces):
    model, ids = learning(objective), draw(2, 5 * WINDOW)
    total, memory = 0, None
    for piece in ids.split(pieces, dim=1):
        output = model(piece, memory=memory, return_memory=True)
        total, memory = total + output.aux_loss, output.memory
    torch.testing.assert_close(total, model(ids).aux_loss, rtol=1e-6, atol=0)


@LEARNING
def test_rows_of_different_lengths_have_the_auxiliary_loss_that_they_have_alone(objective):
    model, lengths = learning(objective), (5 * WINDOW + 1, 3, 2 * WINDOW, 4 * WINDOW - 2)
    ids, width = draw(len(lengths), max(lengths)), max(lengths)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    output = model(ids, attention_mask=mask)
    together = moved(model, output.aux_loss)
    alone = sum(model(ids[i : i + 1, width - n :]).aux_loss for i, n in enumerate(lengths))
    torch.testing.assert_close(output.aux_loss, alone, rtol=1e-6, atol=0)
    torch.testing.assert_close(together, moved(model, alone), rtol=1e-5, atol=1e-4)


@LEARNING
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_keeps_the_auxiliary_loss_and_its_gradients(objective, use_reentrant):
    model, ids = learning(objective, dropout=0.1, attention_dropout=0.1), draw(2, 4 * WINDOW)

    def step():
        torch.manual_seed(0)
        output = model(ids, labels=ids, use_cache=False)
        return output.aux_loss.detach(), output.loss.detach(), moved(model, output.loss)

    wanted = step()
    enable = "activation_checkpointing_enable"  # gradient_..., before transformers 5.20
    enable = enable if hasattr(model, enable) else "gradient_checkpointing_enable"
    getattr(model, enable)({"use_reentrant": use_reentrant})
    torch.testing.assert_close(step(), wanted, rtol=1e-5, atol=1e-6)
    assert wanted[0] > 1e-3


@pytest.mark.parametrize("objective", ["attention", SLOW("autoencoding")])
def test_training_with_the_auxiliary_loss_can_be_compiled(objective):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = learning(objective, num_hidden_layers=1)
    step, ids = torch.compile(model, fullgraph=True, backend="eager"), draw(2, 3 * WINDOW)
    wanted = moved(model, model(ids, labels=ids).loss)
    torch.testing.assert_close(moved(model, step(ids, labels=ids).loss), wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@every_case("kind", ["conv", "dilated_conv"])
@every_case("windows_held", [1, 2])
def test_what_was_never_read_does_not_enter_the_compressed_memory(kind, windows_held):
    """Although a convolution makes something of zeros."""
    length = windows_held * WINDOW
    model = learning(compression=kind, memory_length=length, compressed_memory_length=9).eval()
    ids = draw(2, 5 * WINDOW)
    with torch.no_grad():
        for windows in range(1, 6):
            held = model(ids[:, : windows * WINDOW], return_memory=True).memory.layers[1]
            for states, filled in (
                (held.memory, min(windows, windows_held) * WINDOW),
                (held.compressed, min(max(windows - windows_held, 0) * WINDOW // 2, 9)),
            ):
                slot = torch.arange(states.shape[1])
                wanted = slot >= states.shape[1] - filled
                assert_equal((states != 0).any(-1), wanted.expand(2, -1))


@torch.no_grad()
def test_what_was_forgotten_does_not_enter_the_compressed_memory_either():
    model, ids = build("compressive_transformer", compressed_memory_length=12), draw(1, 4 * WINDOW)
    memory = model(ids[:, : 3 * WINDOW], return_memory=True).memory
    memory = model.base_model.forget(memory, short=0)
    memory = model(ids[:, 3 * WINDOW :], memory=memory, return_memory=True).memory
    held = memory.layers[1]
    assert_equal((held.memory != 0).any(-1), torch.ones(1, WINDOW, dtype=torch.bool))
    # Slots of the first two windows, and nothing of the third, which was forgotten.
    wanted = torch.tensor([[True] * 8 + [False] * 4])
    assert_equal((held.compressed != 0).any(-1), wanted)
    # Nothing is seen of what is empty: with it taken out the next window reads the same.
    following = draw(1, WINDOW)
    output = model(following, memory=memory)
    layers = tuple(
        layer._replace(
            compressed=torch.cat((layer.compressed[:, -4:], layer.compressed[:, :-4]), 1)
        )
        for layer in memory.layers
    )
    shifted = model(following, memory=memory._replace(layers=layers))
    assert_differ(output.logits, shifted.logits)  # but for the distances of what is there
    far = build("compressive_transformer", compressed_memory_length=12, **FLAT)
    assert_near(
        far(following, memory=memory).logits,
        far(following, memory=memory._replace(layers=layers)).logits,
    )


@torch.no_grad()
def test_empty_slots_are_seen_only_if_they_are_not_masked():
    ids, pieces = draw(2, 4 * WINDOW), [5, 9, 18]
    masked = build("compressive_transformer")
    seeing = build("compressive_transformer", mask_empty_memory=False)
    logits = seeing(ids).logits
    assert_near(read_with_cache(seeing, ids.split(pieces, dim=1)), logits)
    difference = (logits - masked(ids).logits).abs().amax((0, 2))
    assert (
        difference[1 : 3 * WINDOW] > 1e-4
    ).all()  # then the memories are full after three windows
    full = seeing(ids, return_memory=True).memory
    following = draw(2, WINDOW)
    assert_near(seeing(following, memory=full).logits, masked(following, memory=full).logits)


@pytest.mark.parametrize("kind", ["conv", "most_used"])
def test_a_step_of_generation_projects_its_own_token_and_no_memory(kind):
    loss = {"conv": "attention", "most_used": "none"}[kind]
    model = build("compressive_transformer", compression=kind, compression_loss=loss)
    ids, rows, cache = draw(1, 3 * WINDOW + 2), [], None
    model.model.layers[0].self_attn.k_proj.register_forward_hook(
        lambda _, inputs, __: rows.append(inputs[0].shape[1])
    )
    with torch.no_grad():
        for i in range(ids.shape[1]):
            rows.clear()
            output = model(ids[:, i : i + 1], cache=cache, use_cache=True)
            cache = output.cache
            if (i + 1) % WINDOW:  # within a window
                assert rows == [1]


@every_case(
    ("given", "told"),
    [
        ({"compression": "median"}, "compression is 'median': it must be one of max_pool"),
        ({"compression_loss": "mse"}, "compression_loss is 'mse': it must be one of attention"),
        ({"compressed_position": "token"}, "compressed_position is 'token': it must be one of"),
        (
            {"compression": "max_pool"},
            "compression is 'max_pool' and compression_loss 'attention': it has nothing to learn",
        ),
        ({"compression_rate": 3}, "window_length is 8 and compression_rate 3: .* multiple"),
        ({"compression_rate": 0}, "compression_rate is 0: it must be 1 or more"),
        ({"memory_length": 12}, "memory_length is 12 and window_length 8: .* whole windows"),
        ({"memory_length": 4}, "memory_length is 4 and window_length 8: .* whole windows"),
        ({"compressed_memory_length": 3}, "compressed_memory_length is 3, .* = 4 slots"),
    ],
    ids=str,
)
def test_sizes_that_cannot_work_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        build("compressive_transformer", **given)


@LEARNING
def test_a_compression_learns_to_keep_what_its_loss_asks_for(objective):
    model, ids = learning(objective, num_hidden_layers=1), draw(2, 3 * WINDOW)
    own = [p for name, p in model.named_parameters() if any(part in name for part in OWN)]
    optimizer = torch.optim.Adam(own, lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(model(ids, labels=ids).aux_loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
