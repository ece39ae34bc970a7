"""A new model is drawn as measured on the released code; a saved one comes back bit by bit."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from .models import (
    EACH,
    FEW,
    MODEL_CLASSES,
    SYSTEMS,
    assert_differ,
    assert_equal,
    build,
    build_config,
    draw,
)

WIDE = {  # so that deviations can be measured
    "hidden_size": 64,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 300,
    "window_length": 48,
    "num_attention_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}
WIDE_MELODI = WIDE | {"num_summary_tokens": 16, "num_short_memory_tokens": 16}
CUT = 0.87962566  # the deviation of a unit normal cut at two


def fresh(name, **changes):
    torch.manual_seed(0)
    config = build_config(name, **(WIDE_MELODI if name.startswith("melodi") else WIDE) | changes)
    return MODEL_CLASSES[type(config)](config)


def assert_normal(weight, std, cut_at=None):
    """Deviation and mean, as near as so many numbers can tell; and where the tail is cut."""
    error = std * weight.numel() ** -0.5
    assert abs(weight.std() - std) < 4 * error
    assert abs(weight.mean()) < 4 * error
    largest = weight.abs().max()
    if cut_at is None:
        assert largest > 2.5 * std or weight.numel() < 200
    else:
        assert largest <= cut_at * (1 + 1e-6)
        assert largest > 0.9 * cut_at or weight.numel() < 200


def kind(name):
    """What a parameter is, by its name."""
    kinds = {
        "initial_state": "small",
        "gate.bias": "small",
        "forget.bias": "small",
        "input.bias": "small",
        "forget.weight": "gate",
        "input.weight": "gate",
        "state_ids": "embedding",
        "lm_head": "embedding",
        "embed_tokens": "embedding",
        "norm": "one",
        "temperature": "one",
        "position": "table",
        "bias": "zero",
        "summary_embeddings": "token",
        "gate": "token",
        "combination": "zero",
        "proj": "kernel",
        "mix": "kernel",
    }
    return next(kind for part, kind in kinds.items() if part in name)


@pytest.mark.parametrize(
    "name",
    [
        *EACH,
        "melodi_masked",
        "block_recurrent_two",
        "memorizing_transformer_side",
    ],
)
def test_parameters_are_drawn_as_measured(name):
    for name_of, parameter in fresh(name).named_parameters():
        parameter = parameter.detach()
        match kind(name_of):
            case "one" | "zero" as value:
                assert_equal(parameter, torch.full_like(parameter, value == "one"))
            case "embedding":
                assert_normal(parameter, 1.0)
            case "small":
                assert_normal(parameter, 0.1)
            case "table":
                assert abs(parameter.std() - 32**-0.5) < 4 * 32**-0.5 * parameter.numel() ** -0.5
            case "token":
                assert_normal(parameter, 0.25 * CUT, cut_at=0.5)
            case "kernel" | "gate" as matrix:
                std = ((0.1 if matrix == "gate" else 1) / parameter.shape[1]) ** 0.5
                assert_normal(parameter, std, cut_at=2 * std / CUT)


def test_every_kind_of_parameter_is_looked_at():
    kinds = {kind(name) for name, _ in fresh("melodi").named_parameters()}
    assert kinds == {"one", "zero", "embedding", "table", "token", "kernel"}
    kinds = {kind(name) for name, _ in fresh("block_recurrent_two").named_parameters()}
    assert kinds == {"one", "embedding", "table", "kernel", "small", "gate"}


@pytest.mark.parametrize("name", FEW)
def test_the_same_seed_gives_the_same_parameters(name):
    config = build_config(name)
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(MODEL_CLASSES[type(config)](config).state_dict())
    for parameter, value in states[0].items():
        assert_equal(states[1][parameter], value)
    embedding = "model.embed_tokens.weight"
    assert_differ(states[2][embedding], states[0][embedding])


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_saved_model_comes_back_bit_by_bit(name, tmp_path):
    model, ids = build(name), draw(2, 20)
    model.save_pretrained(tmp_path)
    given = {"attn_implementation": "eager"} if name == "melodi_no_short" else {}
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **given)
    assert not any(info.values())
    assert type(loaded) is type(model)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for parameter, value in model.state_dict().items():
        assert_equal(state[parameter], value)
    assert loaded.config.to_diff_dict().keys() <= model.config.to_dict().keys() | {"dtype"}
    with torch.no_grad():
        assert_equal(loaded(ids).logits, model(ids).logits)


def test_the_schedule_of_older_checkpoints_has_no_effect(tmp_path):
    """Not even on a layer that a schedule of diagonals would refuse."""
    ids = draw(1, 3 * 8)
    for schedule in ("auto", "layers", "wavefront"):
        build("melodi").save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"schedule": schedule}))
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
        with torch.no_grad():
            assert_equal(model(ids).logits, build("melodi")(ids).logits)


def test_a_model_from_a_config_is_new(tmp_path):
    model = build("melodi")
    torch.manual_seed(7)
    once = AutoModelForCausalLM.from_config(model.config)
    torch.manual_seed(7)
    twice = AutoModelForCausalLM.from_config(model.config)
    weights = [m.get_input_embeddings().weight for m in (once, twice, model)]
    assert_equal(weights[0], weights[1])
    assert_differ(weights[0], weights[2])


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_the_embedding_table_if_tied(tied, tmp_path):
    build("melodi", tie_word_embeddings=tied).save_pretrained(tmp_path)
    for model in (
        build("melodi", tie_word_embeddings=tied),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        head, table = model.lm_head.weight, model.get_input_embeddings().weight
        assert (head.data_ptr() == table.data_ptr()) == tied
        assert torch.equal(head, table) == tied


def test_new_embeddings_are_drawn_and_old_ones_kept():
    model, ids = build("melodi"), draw(2, 9)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(70, mean_resizing=False)
        after = model(ids).logits
    assert after.shape[-1] == 70
    torch.testing.assert_close(after[..., : before.shape[-1]], before, rtol=0, atol=1e-6)
    assert_differ(model.lm_head.weight[-9:], torch.zeros(9, 32))
