"""All systems, as small as they can be: adding one adds a line to `SYSTEMS`."""

import torch

from melodi_hf import (
    BlockRecurrentConfig,
    BlockRecurrentForCausalLM,
    CompressiveTransformerConfig,
    CompressiveTransformerForCausalLM,
    ElasticMemoryConfig,
    ElasticMemoryForCausalLM,
    MelodiCache,
    MelodiConfig,
    MelodiForCausalLM,
    MemorizingTransformerConfig,
    MemorizingTransformerForCausalLM,
    PlainTransformerConfig,
    PlainTransformerForCausalLM,
    TransformerXLConfig,
    TransformerXLForCausalLM,
)

WINDOW = 8  # tokens
VOCABULARY = 61
DOCUMENT = 3 * WINDOW + 5  # tokens: three and a half windows

TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 12,
    "intermediate_size": 40,
    "window_length": WINDOW,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
TINY_MELODI = TINY | {
    "num_summary_tokens": 3,
    "num_short_memory_tokens": 3,
    "long_memory_layers": (1,),
    "num_long_memory_tokens": 2,
    "long_memory_windows": 3,
}
TINY_SCALED = TINY | {
    "memory_length": 2 * WINDOW,
    "compressed_memory_length": 6,  # slots: those of a window and a half
    "compression": "dilated_conv",
    "compression_loss": "none",
    "compressed_position": "scaled",
}
TINY_BLOCK_RECURRENT = TINY | {"recurrent_layers": (1,), "num_state_vectors": 5}
TINY_ELASTIC = TINY | {"memory_layers": (1,), "memory_order": 7, "num_memory_samples": 5}
TINY_MEMORIZING = TINY | {"memory_layer": 0, "memory_length": 12, "num_retrieved": 5}
TINY_SIDE = TINY_MEMORIZING | {
    "memory_layer": 1,
    "placement": "side",
    "retrieval": "dense",
    "memory_combination": "joint",
    "segment_windows": 2,
    "mlp_bias": True,
}
MODEL_CLASSES = {
    MelodiConfig: MelodiForCausalLM,
    TransformerXLConfig: TransformerXLForCausalLM,
    PlainTransformerConfig: PlainTransformerForCausalLM,
    CompressiveTransformerConfig: CompressiveTransformerForCausalLM,
    BlockRecurrentConfig: BlockRecurrentForCausalLM,
    ElasticMemoryConfig: ElasticMemoryForCausalLM,
    MemorizingTransformerConfig: MemorizingTransformerForCausalLM,
}

SYSTEMS = {
    "melodi": (MelodiConfig, TINY_MELODI),
    "melodi_more_short": (MelodiConfig, TINY_MELODI | {"num_short_memory_tokens": 5}),
    "melodi_no_short": (MelodiConfig, TINY_MELODI | {"num_short_memory_tokens": 0}),
    "melodi_no_long": (MelodiConfig, TINY_MELODI | {"long_memory_layers": ()}),
    "melodi_no_memory": (
        MelodiConfig,
        TINY_MELODI | {"num_short_memory_tokens": 0, "long_memory_layers": ()},
    ),
    "melodi_no_mixing": (MelodiConfig, TINY_MELODI | {"mix_tokens": False}),
    "melodi_two_long": (MelodiConfig, TINY_MELODI | {"long_memory_layers": (0, 2)}),
    "melodi_odd_queue": (MelodiConfig, TINY_MELODI | {"long_memory_capacity": 5}),
    "melodi_masked": (MelodiConfig, TINY_MELODI | {"mask_empty_memory": True}),
    "melodi_eager": (MelodiConfig, TINY_MELODI | {"attn_implementation": "eager"}),
    "transformer_xl": (TransformerXLConfig, TINY),
    "transformer_xl_masked": (TransformerXLConfig, TINY | {"mask_empty_memory": True}),
    "transformer_xl_bias": (TransformerXLConfig, TINY | {"mlp_bias": True}),
    "plain_transformer": (PlainTransformerConfig, TINY | {"context_windows": 2}),
    "plain_transformer_window": (PlainTransformerConfig, TINY),
    "compressive_transformer": (CompressiveTransformerConfig, TINY),
    "compressive_transformer_most_used": (
        CompressiveTransformerConfig,
        TINY | {"compression": "most_used", "compression_loss": "none"},
    ),
    "compressive_transformer_scaled": (CompressiveTransformerConfig, TINY_SCALED),
    "block_recurrent": (BlockRecurrentConfig, TINY_BLOCK_RECURRENT),
    "block_recurrent_two": (
        BlockRecurrentConfig,
        TINY_BLOCK_RECURRENT
        | {
            "recurrent_layers": (0, 2),
            "num_state_vectors": 9,
            "gate": "lstm",
            "gate_configuration": "dual",
            "state_reads_previous_window": False,
        },
    ),
    "block_recurrent_masked": (
        BlockRecurrentConfig,
        TINY_BLOCK_RECURRENT
        | {"gate": "full", "gate_configuration": "single", "mask_empty_memory": True},
    ),
    "elastic_memory": (ElasticMemoryConfig, TINY_ELASTIC),
    "elastic_memory_sliding": (
        ElasticMemoryConfig,
        TINY_ELASTIC
        | {
            "memory_layers": (0, 2),
            "sampling": "exponential",
            "other_layers": "sliding",
            "mask_empty_memory": False,
        },
    ),
    "memorizing_transformer": (MemorizingTransformerConfig, TINY_MEMORIZING),
    "memorizing_transformer_joint": (
        MemorizingTransformerConfig,
        TINY_MEMORIZING
        | {"retrieval": "dense", "memory_combination": "joint", "mask_empty_memory": True},
    ),
    "memorizing_transformer_side": (MemorizingTransformerConfig, TINY_SIDE),
}
MELODIS = [name for name in SYSTEMS if name.startswith("melodi")]
# One of each system, where its variants cannot differ.
EACH = [
    "melodi",
    "transformer_xl",
    "plain_transformer",
    "compressive_transformer",
    "block_recurrent",
    "elastic_memory",
    "memorizing_transformer",
]
VARIED = [  # where all would take too long
    "melodi",
    "melodi_no_short",
    "melodi_two_long",
    "melodi_masked",
    "transformer_xl",
    "transformer_xl_masked",
    "plain_transformer",
    "compressive_transformer",
    "compressive_transformer_most_used",
    "block_recurrent",
    "block_recurrent_masked",
    "elastic_memory",
    "memorizing_transformer",
    "memorizing_transformer_side",
]
FORGETFUL = ["melodi_no_memory", "plain_transformer", "plain_transformer_window"]
EACH_REMEMBERING = [name for name in EACH if name not in FORGETFUL]
REMEMBERING = [name for name in SYSTEMS if name not in FORGETFUL]


def build_config(name, **changes):
    config_class, sizes = SYSTEMS[name]
    window = int(changes.get("window_length", WINDOW))
    for length in ("memory_length", "compressed_memory_length"):  # grow with the window
        if length in sizes:
            sizes = sizes | {length: -(-sizes[length] * window // WINDOW)}
    return config_class(**sizes | changes)


def build(name, seed=0, **changes):
    """A model in evaluation mode, its zeros and ones shaken: or nothing would depend on them."""
    torch.manual_seed(seed)
    config = build_config(name, **changes)
    model = MODEL_CLASSES[type(config)](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for layer in model.model.layers:
            layer.self_attn.temperature.weight.mul_(3)  # sharp enough to notice
            layer.self_attn.o_proj.weight.mul_(4)  # or a token is followed by itself
    return model


def draw(*shape):
    """Token ids; never that of the padding."""
    return torch.randint(1, VOCABULARY, shape)


def changed(ids, row, column):
    """`ids` with another token at one place."""
    ids = ids.clone()
    ids[row, column] = ids[row, column] % (VOCABULARY - 1) + 1
    return ids


def read_with_cache(model, pieces, **how):
    """Logits of all pieces, carried by the cache that the model makes itself."""
    cache, logits = None, []
    for piece in pieces:
        output = model(piece, cache=cache, use_cache=True, **how)
        cache = output.cache
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def read_with_melodi_cache(model, pieces, **how):
    """Logits of all pieces, carried by a cache that the user makes."""
    cache = MelodiCache(model.config)
    return torch.cat([model(piece, cache=cache, **how).logits for piece in pieces], dim=1)


def read_with_memory(model, pieces, **how):
    """Logits of all pieces, carried as in training."""
    memory, logits = None, []
    for piece in pieces:
        output = model(piece, memory=memory, return_memory=True, **how)
        memory = output.memory
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


WAYS = [read_with_cache, read_with_melodi_cache, read_with_memory]


def assert_near(found, wanted, atol=1e-5):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def assert_equal(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def assert_differ(found, wanted, by=1e-4):
    assert (found - wanted).abs().max() > by
