"""Conversion of models of the released JAX code (google-research/meliad, commit cc1aef5).

A safetensors file has tensors under flax parameter names, joined by "/" with the prefix `params/`,
and the sizes of the model as JSON in its metadata `config`. flax kernels are [in, out], torch's
weights the transpose. The parameter names determine the system.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from .configuration_block_recurrent import BlockRecurrentConfig
from .configuration_decoder import require
from .configuration_melodi import MelodiConfig
from .configuration_memorizing_transformer import MemorizingTransformerConfig
from .configuration_transformer_xl import TransformerXLConfig
from .modeling_block_recurrent import BlockRecurrentForCausalLM
from .modeling_melodi import MelodiForCausalLM
from .modeling_memorizing_transformer import MemorizingTransformerForCausalLM
from .modeling_transformer_xl import TransformerXLForCausalLM
from .validation import check_finite_weights

# Parameter names of a layer: ours, and those of the released code after the prefix of the layer.
ATTENTION = (
    ("input_layernorm.weight", "tbase/pre_attn_layernorm/scale"),
    ("self_attn.q_proj.weight", "tbase/_kvq/queries_layer/kernel"),
    ("self_attn.k_proj.weight", "tbase/_kvq/keys_layer/kernel"),
    ("self_attn.v_proj.weight", "tbase/_kvq/values_layer/kernel"),
    ("self_attn.o_proj.weight", "tbase/post_attn_mlp/output_layer/kernel"),
    ("self_attn.temperature.weight", "tbase/_kvq/attention_scale"),
    ("self_attn.position.weight", "relative_positions/rel_embedding"),
    ("post_attention_layernorm.weight", "tbase/pre_ffn_layernorm/scale"),
)
FEED_FORWARD = {
    True: (
        ("mlp.up_proj.weight", "tbase/ffn/mlp_layer/input_layer/kernel"),
        ("mlp.up_proj.bias", "tbase/ffn/mlp_layer/input_layer/bias"),
        ("mlp.down_proj.weight", "tbase/ffn/mlp_layer/output_layer/kernel"),
        ("mlp.down_proj.bias", "tbase/ffn/mlp_layer/output_layer/bias"),
    ),
    False: (
        ("mlp.up_proj.weight", "tbase/ffn/hidden0/kernel"),
        ("mlp.down_proj.weight", "tbase/ffn/output_layer/kernel"),
    ),
}
MIXERS = tuple(
    (f"{ours}.{part}", f"{theirs}/{flax}")
    for ours, theirs in (
        ("summary_mixer", "token_mixing_summary"),
        ("short_mixer", "token_mixing_short"),
        ("long_mixer", "long_mem_token_mixing"),
    )
    for part, flax in (
        ("mix.weight", "lin_mix/kernel"),
        ("mix.bias", "lin_mix/bias"),
        ("token_norm.weight", "layernorm1/scale"),
        ("summary_norm.weight", "layernorm2/scale"),
    )
)
STATE = (
    ("queries_to_state.q_proj.weight", "tbase/_kvq/queries2_layer/kernel"),
    ("queries_to_state.temperature.weight", "tbase/attention_scale2"),
    ("initial_state", "recurrent_initial_state"),
    ("state_ids", "recurrent_tbase/_kvq/position_embeddings"),
    ("state_layernorm.weight", "recurrent_tbase/_kvq/pre_attn_layernorm/scale"),
    ("state_keys_values.k_proj.weight", "recurrent_tbase/_kvq/keys_layer/kernel"),
    ("state_keys_values.v_proj.weight", "recurrent_tbase/_kvq/values_layer/kernel"),
    ("state_queries.q_proj.weight", "recurrent_tbase/_kvq/queries_layer/kernel"),
    ("state_queries.temperature.weight", "recurrent_tbase/_kvq/attention_scale"),
    ("state_queries_to_tokens.q_proj.weight", "recurrent_tbase/_kvq/queries2_layer/kernel"),
    ("state_queries_to_tokens.temperature.weight", "recurrent_tbase/attention_scale2"),
    ("state_update.norm.weight", "recurrent_tbase/pre_ffn_layernorm/scale"),
)
# Blocks of the state update that end in a gate: our prefix -> that of the released code.
GATED = {
    "skip": {"": "post_attn_mlp"},
    "single": {"": "ffn"},
    "dual": {"attention.": "post_attn_mlp", "mlp.": "ffn"},
}
GATE = (
    ("o_proj.weight", "output_layer/kernel"),
    ("up_proj.weight", "hidden0/kernel"),
    ("down_proj.weight", "output_layer/kernel"),
    ("gate.bias", "gate_bias"),
)
CONTENT_GATES = {
    "lstm": {"forget": "forget_gate", "input": "input_gate"},
    "full": {"forget": "gate_layer"},
}
GATES = (("gate", "attn_gate"), ("memory_reader.combination.weight", "attn_gate"))
OUTSIDE_LAYERS = (
    ("model.embed_tokens.weight", "embed/embedding"),
    ("model.norm.weight", "layer_stack/final_layernorm/scale"),
    ("model.summary_embeddings", "layer_stack/summary_embeddings"),
)


def from_meliad(path):
    """Load a model of the released code, in float32 and evaluation mode.

    Raises:
        ValueError: the file is damaged, holds a system that is not implemented here, or its
            parameters do not match its sizes.
    """
    sizes, weights = _read(Path(path))
    try:
        model = _build(sizes, weights, path)
    except KeyError as error:
        raise ValueError(f"{path}: the sizes in its metadata lack {error}") from error
    names = parameter_names(model.config)
    missing = [theirs for theirs in names.values() if theirs not in weights]
    unknown = sorted(n for n in weights.keys() - names.values() if weights[n].numel())
    require(
        not [*missing, *unknown],
        f"{path} does not hold the parameters that its sizes ask for: missing {missing[:3]}, "
        f"unknown {unknown[:3]}; it was written by another version or is incomplete",
    )
    state = {ours: _transpose_kernel(theirs, weights[theirs]) for ours, theirs in names.items()}
    own = model.state_dict()
    for ours, tensor in state.items():
        require(
            tensor.shape == own[ours].shape,
            f"{path}: {names[ours]} has shape {tuple(tensor.shape)} (as a torch weight), "
            f"its sizes ask for {tuple(own[ours].shape)}",
        )
    check_finite_weights(state.items(), path)
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return model.eval()


def to_meliad(tensors, config):
    """Convert tensors under our parameter names (weights or gradients) to the released code."""
    return {
        theirs: _transpose_kernel(theirs, tensors[ours])
        for ours, theirs in parameter_names(config).items()
        if ours in tensors
    }


def parameter_names(config):
    """Map our names of all parameters of a model to those of the released code."""
    stack = "melodi_layers_{}/melodi_layer/" if config.model_type == "melodi" else "transformer{}/"
    names = dict(OUTSIDE_LAYERS)
    inner = (*ATTENTION, *FEED_FORWARD[config.mlp_bias], *MIXERS, *GATES)
    if config.model_type == "block_recurrent":
        inner += (*STATE, *_update_names(config))
    for i in range(config.num_hidden_layers):
        layers = ("", stack.format(i)), ("side.", "side_layer/")
        names |= {
            f"model.layers.{i}.{part}{ours}": f"layer_stack/{prefix}{theirs}"
            for part, prefix in layers
            for ours, theirs in inner
        }
    if config.model_type == "block_recurrent":  # the released code has another class for it
        names = {ours: _without_stack(theirs) for ours, theirs in names.items()}
    with torch.device("meta"):
        own = AutoModelForCausalLM.from_config(config).state_dict()
    return {ours: theirs for ours, theirs in names.items() if ours in own}


def _update_names(config):
    # Names of the parameters of the state update of a recurrent layer.
    gates = CONTENT_GATES.get(config.gate, {}).items()
    content = ((f"gate.{ours}.weight", f"{theirs}/kernel") for ours, theirs in gates)
    biases = ((f"gate.{ours}.bias", f"{theirs}/bias") for ours, theirs in gates)
    inner = (*GATE, *content, *biases)
    return tuple(
        (f"state_update.{part}{ours}", f"recurrent_tbase/{block}/{theirs}")
        for part, block in GATED[config.gate_configuration].items()
        for ours, theirs in inner
    )


def _without_stack(name):
    name = name.removeprefix("layer_stack/")
    return name.replace("/tbase/pre_attn_layernorm", "/tbase/_kvq/pre_attn_layernorm")


def _read(path):
    require(path.is_file(), f"{path} is not a file: give the path of a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            config = (file.metadata() or {}).get("config", "")
            names = [name for name in file.keys() if name.startswith("params/")]  # noqa: SIM118
            weights = {name.removeprefix("params/"): file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error
    require(
        config and weights,
        f"{path} is not a model of the released code: it needs tensors under params/ and its "
        f"sizes as JSON in the metadata `config`",
    )
    try:
        return json.loads(config), weights
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the sizes in its metadata are not JSON ({error})") from error


def _build(sizes, weights, path):
    if any("melodi_layers_" in name for name in weights):
        return MelodiForCausalLM(_melodi_config(sizes, weights))
    if any(name.startswith("transformer0/") for name in weights):
        return BlockRecurrentForCausalLM(_block_recurrent_config(sizes, weights))
    layers = [name for name in weights if name.startswith("layer_stack/transformer")]
    unsupported = [name for name in weights if "recurrent" in name]
    require(
        layers and not unsupported,
        f"{path} holds a system that is not implemented here (parameters such as "
        f"{[*unsupported, *sorted(weights)][0]}): give a file of MELODI, Transformer-XL, "
        f"Block-Recurrent or Memorizing Transformer with dense attention",
    )
    if any(name.startswith("layer_stack/side_layer/") for name in weights):
        return MemorizingTransformerForCausalLM(_memorizing_config(sizes, weights, path))
    return TransformerXLForCausalLM(_transformer_xl_config(sizes, weights))


def _shared_sizes(sizes, weights):
    return {
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["embedding_dim"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_heads"],
        "head_dim": sizes["head_size"],
        "intermediate_size": sizes["mlp_dim"],
        "window_length": sizes["window_length"],
        "relative_attention_num_buckets": sizes["t5_num_buckets"],
        "relative_attention_max_distance": sizes["t5_max_distance"],
        "rms_norm_eps": sizes["layernorm_epsilon"],
        "dropout": sizes["dropout"],
        "attention_dropout": sizes["dropout"],
        "mlp_bias": any("ffn/mlp_layer" in name for name in weights),
    }


def _melodi_config(sizes, weights):
    # The released code ignores indices of layers that do not exist.
    layers = range(sizes["num_layers"])
    return MelodiConfig(
        num_summary_tokens=sizes["summary_size"],
        num_short_memory_tokens=sizes["short_term_memory_size"],
        long_memory_layers=tuple(i for i in sizes["long_term_memory_layer_indices"] if i in layers),
        num_long_memory_tokens=sizes["long_term_memory_increment_size"],
        long_memory_capacity=sizes["long_term_memory_size"],
        mix_tokens=sizes["token_mixing"],
        **_shared_sizes(sizes, weights),
    )


def _transformer_xl_config(sizes, weights):
    return TransformerXLConfig(**_shared_sizes(sizes, weights))


def _block_recurrent_config(sizes, weights):
    # The parameters determine the gates; indices may count from the last layer.
    inner = {name.partition("/recurrent_tbase/")[2] for name in weights}
    parts = {name.partition("/")[0] for name in inner}
    gated = "skip" if "ffn" not in parts else "dual" if "post_attn_mlp" in parts else "single"
    kinds = {"fixed": "gate_bias", "lstm": "input_gate", "full": "gate_layer"}
    gates = [gate for gate, part in kinds.items() if any(f"/{part}" in name for name in inner)]
    indices = sizes.get("recurrent_layer_indices", [])
    num_layers = sizes["num_layers"]
    vectors = sizes["recurrent_num_states"] if indices else sizes.get("recurrent_num_states", 1)
    return BlockRecurrentConfig(
        recurrent_layers=tuple(i + num_layers if i < 0 else i for i in indices),
        num_state_vectors=vectors,
        gate=gates[0] if gates else "fixed",
        gate_configuration=gated,
        **_shared_sizes(sizes, weights),
    )


def _memorizing_config(sizes, weights, path):
    length, window = sizes["segment_length"], sizes["window_length"]
    # The released code ignores indices of layers that do not exist.
    after = [i for i in sizes["memory_layer_indices"] if i in range(sizes["num_layers"])]
    require(
        len(after) == 1 and length % window == 0,
        f"{path}: memory_layer_indices are {sizes['memory_layer_indices']} of "
        f"{sizes['num_layers']} layers and segments have {length} tokens: one side layer, and "
        f"segments of whole windows of {window}, can be read",
    )
    return MemorizingTransformerConfig(
        memory_length=sizes["memory_size"],
        memory_layer=after[0],
        segment_windows=length // window,
        placement="side",
        retrieval="dense",
        memory_combination="joint",
        side_residual="double",
        **_shared_sizes(sizes, weights),
    )


def _transpose_kernel(name, tensor):
    return tensor.T if name.endswith("kernel") else tensor
