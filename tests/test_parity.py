"""The models compute what the released JAX code computes, and so do the naive twins.

Where there are no golden tensors, model and twin must agree with each other.
"""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

import melodi_hf
from melodi_hf import (
    BlockRecurrentConfig,
    BlockRecurrentForCausalLM,
    MelodiConfig,
    MelodiForCausalLM,
    MemorizingTransformerConfig,
    MemorizingTransformerForCausalLM,
    TransformerXLConfig,
    TransformerXLForCausalLM,
)
from melodi_hf.models import kernels, retrieval
from melodi_hf.models.meliad import to_meliad

from .parity_report import (
    golden_files,
    gradients,
    held,
    measure,
    named_layers,
    read_golden,
    read_segment,
)
from .references import block_recurrent, blocks, melodi, memorizing_transformer, transformer_xl

TOLERANCE = 1e-5  # absolute, float32; the JAX code, compiled or not, differs from itself by 3e-6
EVERY_GOLDEN_FILE = pytest.mark.parametrize("path", golden_files(), ids=lambda path: path.stem)

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
}
TINY_MELODI = TINY | {
    "num_summary_tokens": 3,
    "num_short_memory_tokens": 3,
    "long_memory_layers": (1,),
    "num_long_memory_tokens": 2,
    "long_memory_windows": 4,
}
CHANGES = {
    "memory of both kinds": {},
    "heads wider than the channels": {"head_dim": 7},
    "more short memory than summary": {"num_short_memory_tokens": 5},
    "less short memory than summary": {"num_short_memory_tokens": 2},
    "no mixing": {"mix_tokens": False},
    "no short memory": {"num_short_memory_tokens": 0},
    "no long memory": {"long_memory_layers": ()},
    "no memory": {"num_short_memory_tokens": 0, "long_memory_layers": ()},
    "long memory in every layer": {"long_memory_layers": (0, 1)},
    "queue no multiple of its increment": {"long_memory_capacity": 5},
    "queue of one window": {"long_memory_windows": 1},
    "nothing enters the queue": {"num_long_memory_tokens": 0, "long_memory_capacity": 3},
    "segment of one window": {"window_length": 8},
}


TINY_BLOCK_RECURRENT = TINY | {"recurrent_layers": (1,), "num_state_vectors": 3}
GATED = [(gate, how) for gate in ("fixed", "lstm", "full") for how in ("skip", "single", "dual")]
TINY_MEMORIZING = TINY | {"memory_layer": 0, "memory_length": 6, "num_retrieved": 3}
SIDE = {
    "placement": "side",
    "retrieval": "dense",
    "memory_combination": "joint",
    "segment_windows": 2,
    "mlp_bias": True,
}
# Not all combinations: each choice with either of the others once.
MEMORIZING = {
    "nearest, gate": {},
    "nearest, joint": {"memory_combination": "joint"},
    "all, gate": {"retrieval": "dense"},
    "all, joint": {"retrieval": "dense", "memory_combination": "joint"},
    "window without positions": {"memory_layer_position_bias": False},
    "all, joint, without positions": {
        "retrieval": "dense",
        "memory_combination": "joint",
        "memory_layer_position_bias": False,
    },
    "side": SIDE,
    "side, nearest": SIDE | {"retrieval": "top_k"},
    "side, gate": SIDE | {"memory_combination": "gate", "side_residual": "single"},
    "side, nearest, gate": SIDE | {"memory_combination": "gate", "retrieval": "top_k"},
    "side, memory of many segments": SIDE | {"memory_length": 24},
    "side, last layer": SIDE | {"memory_layer": 1, "memory_length": 8},
}

TWINS = {
    "melodi": melodi,
    "transformer": transformer_xl,
    "block": block_recurrent,
    "memorizing": memorizing_transformer,
}


@EVERY_GOLDEN_FILE
def test_model_equals_the_released_code(path):
    golden, _ = read_golden(path)
    differences = measure(path)
    assert differences.keys() == {n for n in golden if not n.startswith(("params/", "inputs/"))}
    assert {name: d for name, d in differences.items() if not d <= TOLERANCE} == {}


@pytest.mark.parametrize(
    "case", ["melodi_base", "transformer_xl", "block_recurrent", "memorizing_dense"]
)
def test_a_change_of_any_parameter_is_noticed(case):
    path = next((path for path in golden_files() if path.stem == case), None)
    if path is None:
        pytest.skip(f"the folder has no {case}")
    model = melodi_hf.from_meliad(path)
    kinds = {re.sub(r"\d+", "", name): parameter for name, parameter in model.named_parameters()}
    unnoticed = []
    for name, parameter in kinds.items():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter[..., ::2] *= 1.001  # a part: scaled as a whole, keys are normed back
            worst = max(measure(path, model, segments=1, with_gradients=False).values())
            parameter.copy_(before)
        if worst <= TOLERANCE:
            unnoticed.append(name)
    assert unnoticed == []


@EVERY_GOLDEN_FILE
def test_twin_equals_the_released_code(path):
    golden, sizes = read_golden(path)
    twin = TWINS[path.stem.split("_")[0]]
    with_gradients = "single_window" in path.stem or twin is not melodi
    parameters = {
        name.removeprefix("params/"): tensor.double().requires_grad_(with_gradients)
        for name, tensor in golden.items()
        if name.startswith("params/")
    }
    rows = slice(0, 2 if with_gradients else 1)  # fewer, for time
    state, differences = {}, {}
    for segment in range(sizes["num_segments"]):
        inputs, grads = f"inputs/seg{segment}", f"grads_seg{segment}"
        ids, start = golden[f"{inputs}/input_ids"][rows], golden[f"{inputs}/start_of_sequence"]
        output = blocks.read_segment(twin, parameters, sizes, state, ids, start)
        state = {name: value.detach() for name, value in output["state"].items()}
        found = {f"state/seg{segment}/{name}": value for name, value in state.items()}
        found[f"outputs/seg{segment}/logits"] = output["logits"]
        found[f"outputs/seg{segment}/final_hidden"] = output["hidden"]
        found |= named_layers(f"layers/seg{segment}", sizes, output["xs"], output["us"])
        for name in found.keys() & golden.keys():
            differences[name] = (found[name] - golden[name][rows]).abs().max().item()
        if with_gradients and f"{grads}/embed/embedding" in golden:
            entropy = blocks.next_token_loss(output["logits"], ids)
            gradient = torch.autograd.grad(entropy, parameters.values(), materialize_grads=True)
            for name, value in zip(parameters, gradient, strict=True):
                difference = value - golden[f"{grads}/{name}"]
                differences[f"{grads}/{name}"] = difference.abs().max().item()
    assert differences
    assert {name: d for name, d in differences.items() if not d <= TOLERANCE} == {}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("float64")
def test_melodi_equals_its_twin(change):
    config = MelodiConfig(**TINY_MELODI | CHANGES[change])
    assert_equal(random_model(MelodiForCausalLM, config), melodi)


@pytest.mark.parametrize(
    "change", [name for name in CHANGES if "memory" in name or "queue" in name]
)
@pytest.mark.usefixtures("float64")
def test_melodi_that_does_not_see_empty_memory_equals_its_twin(change):
    config = MelodiConfig(**TINY_MELODI | CHANGES[change] | {"mask_empty_memory": True})
    assert_equal(random_model(MelodiForCausalLM, config), melodi)


@pytest.mark.parametrize("mask_empty_memory", [False, True], ids=["zeros attended", "zeros masked"])
@pytest.mark.parametrize(
    "lengths", [(8, 8, 8), (4, 4, 4), (5, 2, 9)], ids=["windows", "segments of one", "any length"]
)
@pytest.mark.usefixtures("float64")
def test_transformer_xl_equals_its_twin(mask_empty_memory, lengths):
    config = TransformerXLConfig(**TINY, mask_empty_memory=mask_empty_memory)
    assert_equal(random_model(TransformerXLForCausalLM, config), transformer_xl, lengths)


@pytest.mark.parametrize("mask_empty_memory", [False, True], ids=["zeros attended", "zeros masked"])
@pytest.mark.parametrize("change", MEMORIZING)
@pytest.mark.usefixtures("float64")
def test_memorizing_transformer_equals_its_twin(change, mask_empty_memory):
    sizes = TINY_MEMORIZING | MEMORIZING[change] | {"mask_empty_memory": mask_empty_memory}
    config = MemorizingTransformerConfig(**sizes)
    model = random_model(MemorizingTransformerForCausalLM, config)
    assert_equal(model, memorizing_transformer)


@pytest.mark.usefixtures("float64")
def test_transformer_xl_with_biases_equals_its_twin():
    config = TransformerXLConfig(**TINY, mlp_bias=True)
    assert_equal(random_model(TransformerXLForCausalLM, config), transformer_xl)


@pytest.mark.parametrize(("gate", "how"), GATED)
@pytest.mark.usefixtures("float64")
def test_block_recurrent_with_any_gate_equals_its_twin(gate, how):
    gates = {"gate": gate, "gate_configuration": how}
    config = BlockRecurrentConfig(**TINY_BLOCK_RECURRENT | gates)
    assert_equal(random_model(BlockRecurrentForCausalLM, config), block_recurrent)


@pytest.mark.parametrize(
    ("reads_previous", "mask_empty_memory", "lengths"),
    [
        (True, False, (4, 4, 4)),
        (True, False, (5, 2, 9)),
        (True, True, (8, 8, 8)),
        (True, True, (5, 2, 9)),
        (False, False, (8, 8, 8)),
        (False, True, (5, 2, 9)),
    ],
)
@pytest.mark.usefixtures("float64")
def test_block_recurrent_equals_its_twin(reads_previous, mask_empty_memory, lengths):
    """What the state reads, whether it sees zeros, and where segments are cut."""
    config = BlockRecurrentConfig(
        **TINY_BLOCK_RECURRENT | {"recurrent_layers": (0, 1)},
        state_reads_previous_window=reads_previous,
        mask_empty_memory=mask_empty_memory,
    )
    assert_equal(random_model(BlockRecurrentForCausalLM, config), block_recurrent, lengths)


FILES = [
    (TransformerXLForCausalLM, TransformerXLConfig, TINY | {"mlp_bias": b}) for b in (False, True)
]
FILES += [
    (
        BlockRecurrentForCausalLM,
        BlockRecurrentConfig,
        TINY_BLOCK_RECURRENT | {"gate": gate, "gate_configuration": how},
    )
    for gate, how in GATED
]
FILES += [
    (
        BlockRecurrentForCausalLM,
        BlockRecurrentConfig,
        TINY_BLOCK_RECURRENT | {"recurrent_layers": layers},
    )
    for layers in ((0, 1), ())
]


@pytest.mark.parametrize(("model_class", "config_class", "sizes"), FILES)
def test_a_file_of_the_released_code_tells_what_it_holds(
    model_class, config_class, sizes, tmp_path
):
    config = config_class(**sizes, dropout=0.0, attention_dropout=0.0)
    model = random_model(model_class, config).float()
    loaded = melodi_hf.from_meliad(write_released(model, tmp_path / "model.safetensors"))
    assert loaded.config.to_dict() | {"dtype": None} == config.to_dict() | {"dtype": None}
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.usefixtures("float64")
def test_the_window_that_the_state_reads_besides_makes_a_difference():
    model = random_model(BlockRecurrentForCausalLM, BlockRecurrentConfig(**TINY_BLOCK_RECURRENT))
    model.config.state_reads_previous_window = False  # of the twin only: the model is built
    with pytest.raises(AssertionError):
        assert_equal(model, block_recurrent)


@pytest.mark.parametrize(
    "twin",
    [melodi, transformer_xl, block_recurrent],
    ids=["melodi", "transformer_xl", "block_recurrent"],
)
@pytest.mark.usefixtures("float64")
def test_masking_changes_the_beginning_of_a_document(twin):
    if twin is melodi:
        model = random_model(MelodiForCausalLM, MelodiConfig(**TINY_MELODI))
    elif twin is block_recurrent:
        config = BlockRecurrentConfig(**TINY_BLOCK_RECURRENT)
        model = random_model(BlockRecurrentForCausalLM, config)
    else:
        model = random_model(TransformerXLForCausalLM, TransformerXLConfig(**TINY))
    model.config.mask_empty_memory = True  # of the twin only: the model is built
    with pytest.raises(AssertionError):
        assert_equal(model, twin)


@pytest.fixture
def float64(monkeypatch):
    """What the models compute in float32 for accuracy is computed in float64, like the rest;
    what they compute in blocks, in blocks that are smaller than the windows here."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(kernels, "QUERY_BLOCK", 3)
    monkeypatch.setattr(kernels, "CHUNK", 2 * TINY["vocab_size"])
    monkeypatch.setattr(retrieval, "BLOCK", 80)


def random_model(model_class, config):
    """In float64, all parameters drawn again: or biases would be zero and signs alike."""
    torch.manual_seed(0)
    model = model_class(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn_like(parameter))
    return model


def assert_equal(model, twin, lengths=(8, 8, 8)):
    """Outputs, memories and gradients of three segments, of which row 1 begins two documents."""
    parameters = to_meliad(dict(model.named_parameters()), model.config)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    sizes, masked = sizes_of(model.config), model.config.mask_empty_memory
    memory, state, tokens_given = None, {}, 0
    for segment, length in enumerate(lengths):
        ids = torch.randint(model.config.vocab_size, (2, length))
        start = torch.tensor([segment == 0, segment in (0, 2)])
        output, xs, us = read_segment(model, ids, memory, start)
        twins = blocks.read_segment(twin, parameters, sizes, state, ids, start, masked)
        memory, state = output.memory, {name: t.detach() for name, t in twins["state"].items()}
        tokens_given += length
        names = [name for name, t in state.items() if name.endswith("_test") and t.numel()]
        model.zero_grad()
        output.loss.backward()
        entropy = blocks.next_token_loss(twins["logits"], ids)
        gradient = torch.autograd.grad(entropy, list(parameters.values()), materialize_grads=True)
        for ours, theirs in (
            (output.logits, twins["logits"]),
            (output.hidden_states[-1], twins["hidden"]),
            (xs, twins["xs"]),
            (us, twins["us"]),
            (
                [held(memory, name, model.config, tokens_given) for name in names],
                [state[name] for name in names],
            ),
            (output.loss, entropy),
            (gradients(model), dict(zip(parameters, gradient, strict=True))),
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def sizes_of(config):
    """In the words of the JAX code."""
    sizes = {
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "head_size": config.head_dim,
        "window_length": config.window_length,
        "t5_num_buckets": config.relative_attention_num_buckets,
        "t5_max_distance": config.relative_attention_max_distance,
    }
    if isinstance(config, MelodiConfig):
        sizes |= {
            "summary_size": config.num_summary_tokens,
            "short_term_memory_size": config.num_short_memory_tokens,
            "long_term_memory_size": config.long_memory_length,
            "long_term_memory_increment_size": config.num_long_memory_tokens,
            "long_term_memory_layer_indices": config.long_memory_layers,
            "token_mixing": config.mix_tokens,
        }
    if isinstance(config, BlockRecurrentConfig):
        sizes |= {
            "recurrent_layer_indices": config.recurrent_layers,
            "recurrent_num_states": config.num_state_vectors,
            "gate_config": config.gate_configuration,
            "state_reads_previous_window": config.state_reads_previous_window,
        }
    if isinstance(config, MemorizingTransformerConfig):
        sizes |= {
            "memory_size": config.memory_length,
            "memory_layer_indices": [config.memory_layer],
            "placement": config.placement,
            "retrieval": config.retrieval,
            "num_retrieved": config.num_retrieved,
            "memory_combination": config.memory_combination,
            "position_bias": config.memory_layer_position_bias,
            "side_residual": config.side_residual,
        }
    return sizes


def write_released(model, path, **changes):
    """A model as a file of the released code; `changes`: of its sizes."""
    config, tensors = model.config, dict(model.named_parameters())
    sizes = sizes_of(config) | {
        "embedding_dim": config.hidden_size,
        "mlp_dim": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "layernorm_epsilon": config.rms_norm_eps,
        "dropout": 0.0,
    }
    if "recurrent_layer_indices" in sizes:  # counted from the last
        layers = [i - config.num_hidden_layers for i in config.recurrent_layers]
        sizes["recurrent_layer_indices"] = layers
    params = to_meliad(tensors, config)
    params = {f"params/{name}": p.detach().clone().contiguous() for name, p in params.items()}
    save_file(params, path, metadata={"config": json.dumps(sizes | changes)})
    return path
