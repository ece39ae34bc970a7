"""A state is carried beside the window: what moves it, what does not, and how it is forgotten."""

import pytest
import torch

import melodi_hf
from melodi_hf import BlockRecurrentConfig, MelodiCache
from melodi_hf.data.tokens import EncodedDocument
from melodi_hf.evaluation.cards import describe_memory
from melodi_hf.evaluation.perplexity import evaluate_perplexity, list_settings

from .cases import every_case
from .models import WINDOW, assert_differ, assert_equal, assert_near, build, draw
from .test_parity import write_released

ALL = ["block_recurrent", "block_recurrent_two"]


def state_after(model, ids, **how):
    return model(ids, return_memory=True, **how).memory.layers[1].state


@torch.no_grad()
def test_the_state_moves_once_a_window_is_full_and_not_before():
    model, ids = build("block_recurrent"), draw(2, 2 * WINDOW)
    one = state_after(model, ids[:, :WINDOW])
    for tokens in (WINDOW + 1, 2 * WINDOW - 1):
        assert_equal(state_after(model, ids[:, :tokens]), one)
    assert_differ(state_after(model, ids), one)


@torch.no_grad()
def test_a_state_reaches_further_than_the_windows_of_all_layers_do():
    """Four windows back, where one layer sees one window."""
    model, ids = build("block_recurrent", num_hidden_layers=1, recurrent_layers=(0,)), draw(1, 33)
    other = ids.clone()
    other[0, 0] = ids[0, 0] % 60 + 1
    differ = (model(ids).logits - model(other).logits).abs().amax(-1)[0]
    assert (differ[-1] > 1e-7) & (differ[2 * WINDOW :] > 0).all()
    with torch.no_grad():
        model.model.layers[0].state_keys_values.v_proj.weight.zero_()  # nothing is told by it
    differ = (model(ids).logits - model(other).logits).abs().amax(-1)[0]
    assert_equal(differ[WINDOW + 1 :], torch.zeros_like(differ[WINDOW + 1 :]))


def test_tokens_read_the_state_of_the_window_before_their_own():
    """The last window of a call moves the state, and no logit of the call knows of it."""
    model, ids = build("block_recurrent"), draw(2, WINDOW)
    layer = model.model.layers[1]
    model(ids).logits.square().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in layer.state_update.parameters())
    assert layer.initial_state.grad.abs().amax(1).min() > 0
    assert layer.state_keys_values.k_proj.weight.grad.any()


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_go_through_all_windows_of_a_call_and_not_into_the_call_before(masked):
    model, ids = build("block_recurrent", mask_empty_memory=masked), draw(1, 4 * WINDOW)
    layer = model.model.layers[1]
    model(ids).logits[:, 3 * WINDOW :].square().sum().backward()
    assert layer.initial_state.grad.any()
    model.zero_grad()
    memory = model(ids[:, : 2 * WINDOW], return_memory=True).memory
    model(ids[:, 2 * WINDOW :], memory=memory).logits.square().sum().backward()
    assert not layer.initial_state.grad.any()
    assert layer.state_update.gate.openness().requires_grad
    assert any(p.grad.any() for p in layer.state_update.parameters())


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_vectors_are_told_apart_by_their_ids(name):
    model, ids = build(name), draw(2, 3 * WINDOW)
    for layer in model.model.layers[:: 2 if name.endswith("two") else 3]:
        assert hasattr(layer, "state_ids") == name.endswith("two")
    recurrent = [layer for layer in model.model.layers if hasattr(layer, "state_ids")]
    for layer in recurrent:
        layer.initial_state.copy_(layer.initial_state[:1].expand_as(layer.initial_state))
    i = list(model.model.layers).index(recurrent[0])
    spread = f"state_spread/{i}"
    apart = model.model.metrics(model(ids, return_memory=True).memory)[spread]
    recurrent[0].state_ids.zero_()
    alike = model.model.metrics(model(ids, return_memory=True).memory)[spread]
    assert apart > 0.01
    assert alike < 1e-5


# Generation


def counted(model):
    """A list that grows whenever a state is projected to keys and values."""
    calls = []
    layer = model.model.layers[0]
    layer.state_keys_values.register_forward_hook(lambda *_: calls.append(1))
    return calls


@torch.no_grad()
def test_decoding_projects_the_state_once_per_window():
    model = build("block_recurrent", num_hidden_layers=1, recurrent_layers=(0,))
    calls, cache, ids = counted(model), MelodiCache(model.config), draw(2, 3 * WINDOW)
    for i in range(3 * WINDOW):
        model(ids[:, i : i + 1], cache=cache)
    assert len(calls) == 3
    mask = torch.ones(2, 3)
    mask[0, :2] = 0  # rows stand at different slots from now on
    model(draw(2, 3), cache=cache, attention_mask=mask)
    calls.clear()
    for _ in range(2 * WINDOW):
        model(draw(2, 1), cache=cache)
    assert len(calls) == 4


@torch.no_grad()
@pytest.mark.parametrize("carrier", ["memory", "cache"])
def test_the_state_of_a_model_in_bfloat16_is_kept_in_float32(carrier):
    model, ids = build("block_recurrent").bfloat16(), draw(2, 3 * WINDOW + 2)
    if carrier == "cache":
        cache = MelodiCache(model.config)
        model(ids[:, :-1], cache=cache)
        model(ids[:, -1:], cache=cache)
        memory = cache.to_memory(model).layers[1]
    else:
        memory = model(ids, return_memory=True).memory.layers[1]
    kinds = {name: tensor.dtype for name, tensor in memory._asdict().items()}
    assert kinds.pop("state_vectors") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    assert_differ(memory.state, memory.state.bfloat16().float(), by=1e-5)


@torch.no_grad()
def test_a_slow_gate_keeps_its_steps_in_bfloat16():
    model, ids = build("block_recurrent"), draw(1, 100 * WINDOW)
    model.model.layers[1].state_update.gate.bias.fill_(6.0)  # a quarter of a percent per window
    wanted = state_after(model, ids)
    found = state_after(model.bfloat16(), ids)
    assert (found - wanted).norm() < 0.02 * wanted.norm()


# Forgetting: all or nothing


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_a_state_that_is_forgotten_is_the_one_that_documents_begin_with(name):
    model, ids = build(name), draw(2, 4 * WINDOW)
    before = model(ids[:, : 3 * WINDOW], return_memory=True).memory
    rest = ids[:, 3 * WINDOW :]
    left = model(rest, memory=model.base_model.forget(before, long=0)).logits
    layers = tuple(
        held._replace(state_vectors=layer.initial_state.expand_as(held.state).clone())
        if hasattr(held, "state")
        else held
        for layer, held in zip(model.model.layers, before.layers, strict=True)
    )
    assert_equal(left, model(rest, memory=before._replace(layers=layers)).logits)
    assert_differ(left, model(rest, memory=before).logits)


@torch.no_grad()
def test_no_window_can_be_told_from_another_in_a_state():
    model = build("block_recurrent")
    assert model.base_model.windows_kept() == {"short": 1, "long": float("inf")}
    memory = model(draw(1, 2 * WINDOW), return_memory=True).memory
    for count in (1, 99):
        message = f"long={count} windows to keep, but .* empty it with long=0, or leave it"
        with pytest.raises(ValueError, match=message):
            model.base_model.forget(memory, long=count)


def test_settings_of_an_evaluation_empty_the_state_or_leave_it():
    model = build("block_recurrent")
    names = ["carried", "emptied", "short_off", "long_off"]
    assert list_settings(model) == names
    torch.manual_seed(0)
    documents = [EncodedDocument("a", draw(40).numpy(), 40, 40)]
    settings = evaluate_perplexity(model, documents, start_id=1, settings=names)["settings"]
    assert len({round(setting["nll"], 3) for setting in settings.values()}) == 4
    message = "'queue_4' keeps 4 windows, but the long-term memory .* use long_off"
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(model, documents, start_id=1, settings=["queue_4"])


# What is told of it


@torch.no_grad()
@pytest.mark.parametrize("windows", [0, 2])
def test_figures_are_those_computed_by_hand(windows):
    model = build("block_recurrent")
    memory = model(draw(2, windows * WINDOW + 3), return_memory=True).memory
    layer, state = model.model.layers[1], memory.layers[1].state
    found = model.model.metrics(memory)
    rms = torch.stack([row.square().mean().sqrt() for row in state]).mean()
    spread = torch.stack([(row - row.mean(0)).square().mean().sqrt() for row in state]).mean()
    assert_near(found["state_rms/1"], rms)
    assert_near(found["state_spread/1"], spread / rms if windows else spread)
    assert_near(found["gate_openness/1"], torch.sigmoid(-layer.state_update.gate.bias).mean())
    assert found.keys() == {"gate_openness/1", "state_rms/1", "state_spread/1"} | {
        f"memory_rms/{i}" for i in range(3)
    }


@torch.no_grad()
@pytest.mark.parametrize("name", ALL)
def test_openness_is_what_a_gate_lets_in_where_it_sees_nothing(name):
    layer = next(x for x in build(name).model.layers if hasattr(x, "state_ids"))
    for gate in layer.state_update.gates():
        width = next((p.shape[1] for p in gate.parameters() if p.dim() == 2), 1)
        nothing = torch.zeros(1, 1, width)
        let_in = gate(torch.zeros(1, 1, 32), torch.ones(1, 1, 32), nothing)
        assert_near(gate.openness(), let_in.mean())


def test_the_card_counts_the_state_apart():
    told = describe_memory(BlockRecurrentConfig())
    assert "| keys and values | 512 tokens, exactly | 12,582,912 | 25,165,824 |" in told
    assert "| state, 512 vectors in 1 of 12 layers |" in told
    assert "| 524,288 | 1,048,576 |" in told
    assert "| total |  | 13,107,200 | 26,214,400 |" in told
    without = describe_memory(BlockRecurrentConfig(recurrent_layers=()))
    assert "state" not in without


# Configurations


@every_case(
    ("changes", "message"),
    [
        ({"recurrent_layers": (3,)}, r"recurrent_layers \[3\] do not exist: .* 0 to 2; name"),
        ({"recurrent_layers": (-1,)}, r"recurrent_layers \[-1\] do not exist"),
        ({"recurrent_layers": (1, 1)}, r"\[1, 1\] names a layer twice: name each once"),
        ({"num_state_vectors": 0}, "num_state_vectors is 0: it must be 1 or more"),
        ({"gate": "gru"}, "gate is 'gru': it must be one of fixed, lstm, full"),
        (
            {"gate_configuration": "triple"},
            "gate_configuration is 'triple': it must be one of skip, single, dual",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build("block_recurrent", **changes)


@torch.no_grad()
def test_without_recurrent_layers_it_is_a_transformer_xl():
    model, plain = build("block_recurrent", recurrent_layers=()), build("transformer_xl")
    plain.load_state_dict(model.state_dict())
    ids = draw(2, 3 * WINDOW)
    assert_equal(model(ids).logits, plain(ids).logits)


# Files of the released code


def test_files_whose_sizes_are_others_are_refused(tmp_path):
    model = build("block_recurrent")
    for changes, message in (
        ({"recurrent_num_states": 6}, "recurrent_initial_state has shape"),
        ({"recurrent_layer_indices": [-1]}, "missing .*transformer2/"),
        ({"recurrent_layer_indices": []}, "unknown .*transformer1/"),
        ({"recurrent_layer_indices": [-4]}, r"recurrent_layers \[-1\] do not exist"),
    ):
        path = write_released(model, tmp_path / "model.safetensors", **changes)
        with pytest.raises(ValueError, match=message):
            melodi_hf.from_meliad(path)
