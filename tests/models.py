"""Tiny models of all systems, one or two of each: a new system adds a line to `SYSTEMS`."""

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
TINY_MOST_USED = TINY | {
    "memory_length": 2 * WINDOW,
    "compressed_memory_length": 6,  # slots: those of a window and a half
    "compression": "most_used",
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
    "mask_empty_memory": True,
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
    # Melodi: each option in one of three models, combined where they do not touch each other.
    "melodi": (MelodiConfig, TINY_MELODI),
    "melodi_masked": (
        MelodiConfig,
        TINY_MELODI
        | {
            "num_short_memory_tokens": 5,  # more than summary tokens
            "long_memory_layers": (0, 2),
            "long_memory_capacity": 5,  # no multiple of what a window appends
            "mask_empty_memory": True,
        },
    ),
    "melodi_no_short": (
        MelodiConfig,
        TINY_MELODI | {"num_short_memory_tokens": 0, "attn_implementation": "eager"},
    ),
    "transformer_xl": (TransformerXLConfig, TINY),
    "plain_transformer": (PlainTransformerConfig, TINY | {"context_windows": 2, "mlp_bias": True}),
    "compressive_transformer": (CompressiveTransformerConfig, TINY),
    "compressive_transformer_most_used": (CompressiveTransformerConfig, TINY_MOST_USED),
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
            "mask_empty_memory": True,
        },
    ),
    "elastic_memory": (ElasticMemoryConfig, TINY_ELASTIC),
    "memorizing_transformer": (MemorizingTransformerConfig, TINY_MEMORIZING),
    "memorizing_transformer_side": (MemorizingTransformerConfig, TINY_SIDE),
}
# One of each system, for what its options do not change. (A plain Transformer is a Transformer-XL
# that carries nothing.)
EACH = [
    "melodi",
    "transformer_xl",
    "compressive_transformer",
    "block_recurrent",
    "elastic_memory",
    "memorizing_transformer",
]
# Shared code that no system overrides: three memories as different as can be.
FEW = ["melodi", "transformer_xl", "memorizing_transformer_side"]
REMEMBERING = [name for name in SYSTEMS if name != "plain_transformer"]


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


# The two places where tests look into a cache.


def tokens_read(cache):
    """How many tokens each row of a cache has read."""
    return cache.layers[0].progress.tokens_read


def tensors_of(cache):
    """All that a cache holds, layer by layer."""
    return [tensor for layer in cache.layers for tensor in layer.memory]
