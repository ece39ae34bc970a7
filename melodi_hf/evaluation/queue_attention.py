"""Measure attention to MELODI's long-term memory (the queue) by the age of its entries.

A window attends to the entries that previous windows appended to the queue. The entry of the
previous window has age 1, the one before it age 2, and so on. For each head:

    ratio   mean over windows of (weight on the entries of an age) * (windows in the queue): 1 is
            uniform
    breadth exp(entropy of a token's weights) / (slots in the queue), mean over tokens: 1 is
            uniform for every token; a ratio of 1 may also come from sharp but varying attention
    share   1 - g, the part of the queue's output behind the gate, for each channel
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from melodi_hf.evaluation.perplexity import evaluation_mode
from melodi_hf.models.modules import attend


class WindowAttention(NamedTuple):
    """The attention of one window to the queue."""

    weights: Tensor  # H J, mean over tokens
    breadth: Tensor  # H


def queue_attention(
    model: PreTrainedModel,
    ids: Sequence[int] | np.ndarray | Tensor,
    *,
    segment_windows: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure attention to the queue while a model reads a document; return JSON data.

    Only complete windows are read. Raises ValueError for a model without a queue, for a queue whose
    length is not a multiple of a window's entries, and for a document of fewer than two windows.
    """
    ids = torch.as_tensor(ids, dtype=torch.long)
    check_measurable(model.config, len(ids))
    window = model.config.window_length
    recorded: dict[int, list[WindowAttention]] = {
        layer: [] for layer in model.config.long_memory_layers
    }
    segments = ids[: len(ids) // window * window].split(segment_windows * window)
    memory = None
    with evaluation_mode(model), record_attention(model, recorded):
        for segment in tqdm(segments, desc="queue attention", disable=not progress):
            given = segment[None].to(model.device)
            options = {"return_memory": True, "use_cache": False, "logits_to_keep": 1}
            memory = model(given, memory=memory, **options).memory
    return {
        "window_length": window,
        "windows_read": len(ids) // window,
        "layers": [layer_row(model, layer, recorded[layer]) for layer in recorded],
    }


@contextmanager
def record_attention(model, recorded: dict[int, list[WindowAttention]]) -> Iterator[None]:
    """Record the attention of each window to the queue, by layer."""
    attentions = {layer: model.model.layers[layer].self_attn for layer in recorded}
    for layer, attention in attentions.items():
        attention.attend_slots = partial(append_attention, recorded[layer], attention)
    try:
        yield
    finally:
        for attention in attentions.values():
            del attention.attend_slots


def append_attention(windows: list[WindowAttention], attention, q, k, v, filled) -> Tensor:
    """Record the weights of attention to the queue; returns what `attend_slots` does."""
    weights = attention_weights(attention, q, k, filled)
    entropy = torch.special.entr(weights).sum(-1)  # B H T
    slots = (weights > 0).any(2).sum(-1)[..., None].clamp(min=1)
    breadth = (entropy.exp() / slots).mean((0, 2))
    windows.append(WindowAttention(weights.mean((0, 2)).cpu(), breadth.cpu()))
    return type(attention).attend_slots(attention, q, k, v, filled)


def attention_weights(attention, q, k, filled) -> Tensor:
    """Compute attention of queries (B H T K) to the slots of the queue (B H J K): B H T J."""
    bias = attention.mask_empty(None, k.shape[2], filled)
    _, weights = attend(q, k, k, bias, return_weights=True)
    return weights.float()


def layer_row(model, layer: int, looks: list[WindowAttention]) -> dict[str, Any]:
    """Summarize the attention and the gate of one layer."""
    share = 1 - model.model.layers[layer].gate.detach().sigmoid().float().cpu()
    weights = torch.stack([look.weights for look in looks])
    ratios = ratios_by_age(weights, model.config.num_long_memory_tokens)
    breadth = torch.stack([look.breadth for look in looks[1:]])  # the queue is empty in the first
    bins = [(low, min(2 * low, ratios.shape[1] + 1)) for low in powers_of_two(ratios.shape[1])]
    return {
        "layer": layer,
        "ages": [[low, high - 1] for low, high in bins],  # both included
        "ratio": [
            [head[low - 1 : high - 1].mean().item() for low, high in bins] for head in ratios
        ],
        "breadth": breadth.mean(0).tolist(),
        "share": [head.sort().values.tolist() for head in share],
    }


def ratios_by_age(weights: Tensor, slots_per_window: int) -> Tensor:
    """Compute ratios by age: N H J, oldest slot first -> H A, ages that occur."""
    by_age = weights.unflatten(2, (-1, slots_per_window)).sum(3).flip(2)  # N H Q
    num_windows = torch.arange(len(weights)).clamp(max=by_age.shape[2])  # windows in the queue
    seen = torch.arange(by_age.shape[2]) < num_windows[:, None]
    ratios = (by_age * num_windows[:, None, None] * seen[:, None]).sum(0) / seen.sum(0).clamp(min=1)
    return ratios[:, : int(num_windows.max())]


def powers_of_two(end: int) -> list[int]:
    return [2**i for i in range(end.bit_length())]


def check_measurable(config, num_tokens: int) -> None:
    if not getattr(config, "long_memory_layers", ()):
        raise ValueError(
            f"this {config.model_type} model has no queue (no long_memory_layers): pass a MELODI "
            "with long-term memory"
        )
    slots, pushed = config.long_memory_length, config.num_long_memory_tokens
    if not pushed or slots % pushed:
        raise ValueError(
            f"the queue has {slots} slots and each window appends {pushed} entries: ages are "
            "defined only if the slots are a multiple of the entries"
        )
    if num_tokens < 2 * config.window_length:
        raise ValueError(
            f"the document has {num_tokens} tokens: pass at least {2 * config.window_length}, two "
            "windows, since the queue is empty in the first"
        )
