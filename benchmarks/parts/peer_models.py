"""MELODI and models of its size from transformers, for `benchmarks/peers.py`.

All have random weights, the same width and vocabulary, and tied heads. Parameter counts are matched
to MELODI's by the width of the feed-forward network, or by the number of layers for Mamba2, which
has no feed-forward network. There are as many key heads as query heads; windows are as long as
MELODI's.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    RecurrentGemmaConfig,
    StaticCache,
)
from transformers.utils import logging

from melodi_hf import MelodiCache, MelodiConfig
from melodi_hf.models.validation import CACHE_NAME

MAMBA_CACHE_NAME = "cache" if CACHE_NAME == "cache" else "cache_params"  # transformers before 5.24

logging.set_verbosity_error()

SMALL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1024,
    "window_length": 512,
    "num_summary_tokens": 32,
    "num_short_memory_tokens": 32,
    "long_memory_layers": (2,),
    "num_long_memory_tokens": 16,
    "long_memory_windows": 128,
}
TINY = SMALL | {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "window_length": 16,
    "num_summary_tokens": 4,
    "num_short_memory_tokens": 4,
    "num_long_memory_tokens": 2,
    "long_memory_windows": 4,
}
PAPER = {"vocab_size": 4096}  # and the defaults of MelodiConfig: 12 layers of 1024 channels
SIZES = {"tiny": TINY, "small": SMALL, "paper": PAPER}
LENGTHS = {"tiny": [32, 64], "small": [1 << n for n in (12, 14, 16, 18)]}
LENGTHS["paper"] = LENGTHS["small"]
LONGEST = 1 << 20  # maximum number of positions


def melodi_config(size):
    return MelodiConfig(**SIZES[size], dropout=0.0, attention_dropout=0.0)


def shared(size):
    """Return the options that all models share with MELODI."""
    config = melodi_config(size)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def heads(size):
    config = melodi_config(size)
    return {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
    }


def llama_config(size, width):
    return LlamaConfig(
        **shared(size), **heads(size), intermediate_size=width, max_position_embeddings=LONGEST
    )


def window_config(size, width):
    return MistralConfig(
        **shared(size),
        **heads(size),
        intermediate_size=width,
        sliding_window=melodi_config(size).window_length,
        max_position_embeddings=LONGEST,
    )


def griffin_config(size, width):
    window = melodi_config(size).window_length
    return RecurrentGemmaConfig(
        **shared(size), **heads(size), intermediate_size=2 * width, attention_window_size=window
    )


def mamba_config(size, layers):
    given, head_dim = shared(size), min(64, melodi_config(size).head_dim)
    given["num_hidden_layers"] = layers
    num_heads = 2 * given["hidden_size"] // head_dim
    return Mamba2Config(**given, num_heads=num_heads, head_dim=head_dim, n_groups=1)


class Peer(NamedTuple):
    """The configuration of a model and how its size is matched."""

    config: Callable  # maps size and the matched value to a configuration
    matched: str | None = None  # the field that is changed to match parameters
    step: int = 8  # granularity of that field
    cache_name: str = CACHE_NAME
    grows: bool = False  # whether its state grows with the document


PEERS = {
    "MELODI": Peer(melodi_config),
    "Llama": Peer(llama_config, "width", grows=True),
    "sliding window": Peer(window_config, "width"),
    "RecurrentGemma": Peer(griffin_config, "width"),
    "Mamba2": Peer(mamba_config, "layers", step=1, cache_name=MAMBA_CACHE_NAME),
}


def parameters(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


@lru_cache
def matched_config(name, size):
    """Return the configuration whose parameter count is nearest to MELODI's."""
    peer = PEERS[name]
    if peer.matched is None:
        return peer.config(size)
    few, more = (parameters(peer.config(size, n * peer.step)) for n in (4, 8))
    steps = 4 + round(4 * (parameters(melodi_config(size)) - few) / (more - few))
    return peer.config(size, steps * peer.step)


def config_sizes(config):
    """Return the fields that determine the size."""
    return {name: x for name, x in config.to_diff_dict().items() if name != "transformers_version"}


class Reader:
    """A model that reads one row, with its state."""

    def __init__(self, name, size, machine):
        self.peer, self.machine, self.config = PEERS[name], machine, matched_config(name, size)
        torch.manual_seed(0)
        with machine.device:
            model = AutoModelForCausalLM.from_config(self.config)
        self.model = model.to(machine.dtype).eval()
        self.cache = None

    def draw(self, tokens):
        shape = 1, tokens
        return torch.randint(1, self.config.vocab_size, shape, device=self.machine.device)

    @torch.inference_mode()
    def call(self, ids):
        cache = {self.peer.cache_name: self.cache}
        return self.model(ids, **cache, use_cache=True, logits_to_keep=1).logits

    def forget(self):
        self.cache = None
        if isinstance(self.config, MelodiConfig):
            self.cache = MelodiCache(self.config)
        else:
            self.cache = DynamicCache(config=self.config)
        if isinstance(self.config, RecurrentGemmaConfig):  # its modules have part of the state
            device, dtype = self.machine.device, self.machine.dtype
            self.model.model._setup_cache(self.config, 1, device, dtype)

    def prefill(self, ids, piece):
        """Read a document; return seconds. piece: tokens per call; None: all."""
        self.forget()

        def work():
            for part in ids.split(piece or ids.shape[1], dim=1):
                self.call(part)

        return self.machine.seconds(work)

    def prepare_decoding(self, tokens):
        """Allocate the cache for decoding."""
        if self.peer.grows:
            read = self.cache.get_seq_length()
            static = StaticCache(config=self.config, max_cache_len=read + tokens)
            for i, layer in enumerate(self.cache.layers):
                static.update(layer.keys, layer.values, i)
            self.cache = static

    def decode(self, tokens):
        """Return the seconds of each token."""
        ids = self.draw(tokens).split(1, dim=1)
        return [self.machine.seconds(lambda one=one: self.call(one)) for one in ids]

    def state_bytes(self):
        """Return the bytes of all tensors of the state."""
        found = find_tensors(self.cache) + [
            value
            for module in self.model.modules()
            for name, value in vars(module).items()
            if name in ("recurrent_states", "conv1d_state") and value is not None
        ]
        return sum({t.data_ptr(): t.nbytes for t in found}.values())


def find_tensors(value):
    """Find all tensors in nested objects of a cache."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for each in value.values() for t in find_tensors(each)]
    if isinstance(value, (list, tuple)):
        return [t for each in value for t in find_tensors(each)]
    return find_tensors(vars(value)) if hasattr(value, "__dict__") and not callable(value) else []
