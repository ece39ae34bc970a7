"""What cannot work is refused with a `ValueError` that names it, what is allowed and the remedy."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from melodi_hf import MelodiCache, MelodiConfig
from melodi_hf.models.configuration_decoder import DecoderConfig

from .cases import every_case
from .models import (
    EACH,
    MODEL_CLASSES,
    VOCABULARY,
    WINDOW,
    assert_equal,
    assert_near,
    build,
    build_config,
    draw,
)

LENGTH = WINDOW + 3

SIZES = [
    (name, value, rf"{name} is {value}: it must be 1 or more")
    for value, name in (
        (0, "vocab_size"),
        (-3, "hidden_size"),
        (0, "num_hidden_layers"),
        (-3, "num_attention_heads"),
        (0, "head_dim"),
        (0, "intermediate_size"),
        (0, "window_length"),
    )
]
RATES = [
    (name, value, rf"{name} is {value}: it is a probability, 0 <= {name} < 1")
    for name, value in (
        ("dropout", 1.0),
        ("attention_dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", float("nan")),
    )
]
BUCKETS = [
    ("relative_attention_num_buckets", 7, "num_buckets is 7 .* the first must be even"),
    ("relative_attention_num_buckets", 0, "num_buckets is 0 .* the first must be even"),
    ("relative_attention_max_distance", 4, "distance 4: .* greater than half of the first"),
]
TYPES = [
    ("window_length", "8", r"'window_length' expected int, got str \(value: '8'\)"),
    ("window_length", True, r"'window_length' expected int, got bool \(value: True\)"),
    ("hidden_size", 32.5, r"'hidden_size' expected int, got float \(value: 32.5\)"),
    ("mlp_bias", "yes", r"'mlp_bias' expected bool, got str \(value: 'yes'\)"),
    ("dropout", "0.1", "'dropout' with value '0.1' doesn't match any type in .*float"),
]


@every_case(("field", "value", "message"), SIZES + RATES + BUCKETS + TYPES)
def test_sizes_that_cannot_work(field, value, message):
    assert build_config("melodi")  # which differs in this field alone
    with pytest.raises(ValueError, match=message):
        build_config("melodi", **{field: value})


@pytest.mark.parametrize("name", [*EACH, "plain_transformer"])
def test_every_system_checks_the_sizes_that_all_have(name):
    for field, value, message in (SIZES[0], RATES[0], BUCKETS[0], TYPES[0]):
        with pytest.raises(ValueError, match=message):
            build_config(name, **{field: value})


MELODI_SIZES = [
    ({"num_summary_tokens": -1}, "num_summary_tokens is -1: it must be 0 or more"),
    ({"num_short_memory_tokens": -2}, "num_short_memory_tokens is -2: it must be 0 or more"),
    ({"num_long_memory_tokens": -1}, "num_long_memory_tokens is -1: it must be 0 or more"),
    ({"long_memory_windows": 0}, "long_memory_windows is 0: it must be 1 or more"),
    (
        {"long_memory_layers": (1, 3)},
        r"long_memory_layers \[3\] do not exist: the model has 3 layers, 0 to 2; name some of",
    ),
    ({"long_memory_layers": (-1,)}, r"long_memory_layers \[-1\] do not exist"),
    ({"long_memory_layers": (1, 1)}, r"\[1, 1\] names a layer twice: name each once"),
    ({"long_memory_layers": 1}, "'long_memory_layers' with value 1 doesn't match any type"),
    (
        {"mix_tokens": False, "num_short_memory_tokens": 2},
        r"num_summary_tokens \(3\) and num_short_memory_tokens \(2\) must be equal",
    ),
    (
        {"long_memory_capacity": 1},
        r"holds 1 tokens, but each window pushes num_long_memory_tokens=2: .* set long_memory_lay",
    ),
    ({"long_memory_capacity": -4}, "holds -4 tokens"),
    ({"num_long_memory_tokens": 0}, "holds 0 tokens"),
]


@every_case(("changes", "message"), MELODI_SIZES)
def test_melodis_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        build_config("melodi", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"long_memory_layers": [0, 1, 2]},
        {"long_memory_layers": (), "long_memory_capacity": 1},
        {"long_memory_capacity": 2},
        {"num_long_memory_tokens": 0, "long_memory_capacity": 1},
        {"num_summary_tokens": 0, "num_short_memory_tokens": 0},
        {"num_summary_tokens": 0},
        {"mix_tokens": False, "num_summary_tokens": 0, "num_short_memory_tokens": 0},
        {"dropout": 0},
    ],
    ids=str,
)
def test_melodis_at_the_edge_of_what_works(changes):
    model, ids = build("melodi", **changes), draw(2, 3 * WINDOW + 2)
    with torch.no_grad():
        whole = model(ids).logits
        memory = model(ids[:, :LENGTH], return_memory=True).memory
        assert_near(model(ids[:, LENGTH:], memory=memory).logits, whole[:, LENGTH:])
    assert whole.isfinite().all()


@pytest.fixture
def model():
    """One for all: the checks lie in code that no system overrides."""
    return build("melodi")


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_ids_outside_the_vocabulary(model, wrong):
    ids = draw(2, LENGTH)
    ids[1, 3] = wrong
    message = rf"input_ids contain {wrong}: the vocabulary has the ids 0 to {VOCABULARY - 1}; use"
    with pytest.raises(ValueError, match=message):
        model(ids)
    ids[1, 3] = VOCABULARY - 1
    model(ids)


@every_case(
    ("shape", "message"),
    [
        ((2, 1, LENGTH, LENGTH), r"shape \(2, 1, 11, 11\): it must be 2 rows of 0 at .*\(4-D ones"),
        ((LENGTH,), r"shape \(11,\): it must be 2 rows"),
        ((3, LENGTH), r"shape \(3, 11\): it must be 2 rows"),
        ((2, LENGTH - 1), "has 10 columns: it must have 11, one per token of this call, or"),
        ((2, LENGTH + 1), "has 12 columns: it must have 11"),
    ],
)
def test_masks_of_other_shapes(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model(draw(2, LENGTH), attention_mask=torch.ones(shape))


def test_a_mask_that_does_not_fit_the_memory(model):
    cache, ids = MelodiCache(model.config), draw(2, LENGTH)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match=r"has 5 columns: it must have 4, .* or 15, with the 11"):
        model(draw(2, 4), cache=cache, attention_mask=torch.ones(2, 5))
    model(draw(2, 4), cache=cache, attention_mask=torch.ones(2, 15))


def test_packed_rows(model):
    ids = draw(2, LENGTH)
    positions = torch.arange(LENGTH).expand(2, -1)
    packed = torch.stack((positions[0], torch.cat((torch.arange(6), torch.arange(5)))))
    message = r"restart in row 1 at column 6: .*packing=False\), or read them in turn with reset"
    with pytest.raises(ValueError, match=message):
        model(ids, position_ids=packed)
    with torch.no_grad():
        assert_equal(model(ids, position_ids=positions).logits, model(ids).logits)


@pytest.mark.parametrize("padding", [0, 1])
def test_positions_of_rows_padded_on_the_left_are_not_packed_rows(model, padding):
    """generate() fills them with 0 or 1 where there is padding."""
    ids, mask = draw(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, padding)
    with torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=positions).logits
        assert_equal(found, model(ids, attention_mask=mask).logits)


def other(model):
    return build(next(name for name in EACH if name != model.config.model_type))


@pytest.mark.parametrize("name", EACH)
def test_the_memory_of_another_model(name):
    model, ids = build(name), draw(2, LENGTH)
    cases = {
        "memory of layer 0 has the fields .* this model's .*another model": other(model),
        r"layer 0, \w+, has shape \(2, .* and this model's \(rows, .*another model": build(
            model.config.model_type, hidden_size=16, head_dim=6
        ),
        "memory has 2 layers and this model 3: it is that of another model": build(
            model.config.model_type, num_hidden_layers=2
        ),
    }
    for message, foreign in cases.items():
        memory = foreign(ids, return_memory=True).memory
        with pytest.raises(ValueError, match=message):
            model(ids, memory=memory)
    model(ids, memory=model(ids, return_memory=True).memory)


def test_the_memory_of_another_batch(model):
    memory = model(draw(3, LENGTH), return_memory=True).memory
    with pytest.raises(ValueError, match=r"memory holds 3 rows and the batch has 2: .*"):
        model(draw(2, LENGTH), memory=memory)


@every_case("wrong", [(), {}, "memory", torch.zeros(2, 3)], ids=str)
def test_what_is_not_a_memory(model, wrong):
    message = f"memory is a {type(wrong).__name__}: give what a call with return_memory=True"
    with pytest.raises(ValueError, match=message):
        model(draw(2, LENGTH), memory=wrong)


def test_the_cache_of_another_model(model):
    ids, cache = draw(2, LENGTH), MelodiCache(model.config)
    other(model)(ids, cache=(foreign := MelodiCache(other(model).config)))
    with pytest.raises(ValueError, match="it is that of another model"):
        model(ids, cache=foreign)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="the cache holds 2 rows and the batch has 3"):
        model(draw(3, LENGTH), cache=cache)


def test_memory_together_with_a_cache(model):
    ids = draw(2, LENGTH)
    memory = model(ids, return_memory=True).memory
    with pytest.raises(ValueError, match=r"cache .* and memory are both given.* pass one of them"):
        model(ids, memory=memory, cache=MelodiCache(model.config))


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_of_another_shape(model, name):
    for shape in ((2, LENGTH - 1), (1, LENGTH), (2 * LENGTH,)):
        message = (
            rf"{name} have shape \({shape[0]},.* and the input \(2, 11\): give one label per t"
        )
        with pytest.raises(ValueError, match=message):
            model(draw(2, LENGTH), **{name: draw(*shape)})


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_labels_outside_the_vocabulary(model, wrong):
    ids = draw(2, LENGTH)
    labels = ids.clone()
    labels[1, 3] = wrong
    with pytest.raises(ValueError, match=rf"labels contain {wrong}: .* 0 to {VOCABULARY - 1}"):
        model(ids, labels=labels)


@every_case(
    "wrong", [torch.tensor([True]), torch.tensor([True] * 3), torch.tensor([1, 0]), True], ids=str
)
def test_reset_memory_that_is_not_a_mask_of_the_rows(model, wrong):
    ids = draw(2, LENGTH)
    memory = model(ids, return_memory=True).memory
    with pytest.raises(ValueError, match=r"reset_memory .* 2 rows"):
        model(ids, memory=memory, reset_memory=wrong)


def test_ids_and_embeddings_at_once_or_neither(model):
    ids = draw(2, LENGTH)
    x = model.get_input_embeddings()(ids)
    message = "pass exactly one of input_ids and inputs_embeds"
    with pytest.raises(ValueError, match=message):
        model(ids, inputs_embeds=x)
    with pytest.raises(ValueError, match=message):
        model()
    with pytest.raises(ValueError, match=message):
        model(labels=ids)


def test_a_call_without_tokens(model):
    with pytest.raises(ValueError, match="the call has 0 tokens: give at least 1 per row"):
        model(draw(2, 0))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(model, wrong, tmp_path):
    model.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][2, 3:5] = wrong
    save_file(weights, path, metadata={"format": "pt"})
    message = r"2 of the 1280 numbers of model.layers.1.mlp.up_proj.weight in .* load an earlier"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MODEL_CLASSES[type(model.config)].from_pretrained(tmp_path, output_loading_info=True)


def test_a_skeleton_without_a_memory():
    with pytest.raises(ValueError, match="DecoderConfig names no memory: use one of its subcl"):
        DecoderConfig().memory_floats()


@every_case(
    ("field", "value"),
    [("rms_norm_eps", -1.0), ("initial_temperature", 0.0), ("initial_embedding_std", -0.5)],
)
def test_numbers_that_must_be_positive(field, value):
    with pytest.raises(ValueError, match=rf"{field} is {value}: it must be greater than 0"):
        MelodiConfig(**{field: value})


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"hidden_act is 'nonsense': transformers knows .*relu"):
        MelodiConfig(hidden_act="nonsense")


@pytest.mark.parametrize("shape", [(11,), (2, 11, 3)])
def test_ids_that_are_not_rows_and_columns(model, shape):
    with pytest.raises(ValueError, match=r"input has shape .* rows and columns"):
        model(draw(*shape))


def test_embeddings_of_another_width(model):
    with pytest.raises(ValueError, match=r"input has shape \(2, 11, 7\)"):
        model(inputs_embeds=torch.zeros(2, 11, 7))


def test_cache_that_is_a_tuple(model):
    with pytest.raises(ValueError, match=r"cache is a tuple: give MelodiCache"):
        model(draw(2, 11), cache=((), ()))
