"""How far back MELODI's long-term memory is read: attention to the queue by the age of its entries.

A window attends to what the windows before it pushed into the queue: the entry of the last one has
age 1, that of the one before has age 2, and so on to the oldest that the queue holds. For each head

    ratio   mean over windows of (weight on the entries of an age) * (windows in the queue): 1 is
            an even spread
    breadth exp(entropy of a token's weights) / (slots in the queue), its mean: 1 is an even spread
            of every token, as a ratio of 1 may also come of sharp looks in all directions
    share   1 - g, what the gate lets through of the queue, for each channel
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

from melodi_hf.evaluation.perplexity import evaluating


class Look(NamedTuple):
    """How one window attends to the queue."""

    weights: Tensor  # H J, the mean of its tokens
    breadth: Tensor  # H


def queue_attention(
    model: PreTrainedModel,
    ids: Sequence[int] | np.ndarray | Tensor,
    *,
    segment_windows: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """What a MELODI looks up in its queue while it reads one document; ready for JSON.

    Only whole windows are read. Raises ValueError for a model without a queue, for a queue that
    holds parts of windows, and for a document of fewer than two windows.
    """
    ids = torch.as_tensor(ids, dtype=torch.long)
    refuse_unmeasurable(model.config, len(ids))
    window = model.config.window_length
    kept: dict[int, list[Look]] = {layer: [] for layer in model.config.long_memory_layers}
    segments = ids[: len(ids) // window * window].split(segment_windows * window)
    memory = None
    with evaluating(model), keeping_weights(model, kept):
        for segment in tqdm(segments, desc="queue attention", disable=not progress):
            given = segment[None].to(model.device)
            options = {"return_memory": True, "use_cache": False, "logits_to_keep": 1}
            memory = model(given, memory=memory, **options).memory
    return {
        "window_length": window,
        "windows_read": len(ids) // window,
        "layers": [layer_row(model, layer, kept[layer]) for layer in kept],
    }


@contextmanager
def keeping_weights(model, kept: dict[int, list[Look]]) -> Iterator[None]:
    """Inside, each window adds to the list of its layer how it looks at the queue."""
    modules = model.model.layers
    handles = [
        modules[layer].self_attn.register_forward_pre_hook(partial(keep, windows))
        for layer, windows in kept.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keep(windows: list[Look], attention, given) -> None:
    q, k, _, bias, num_slots, filled = given[:6]
    if bias is None:  # distances mean nothing to the queue alone
        weights = weights_of(attention, q, k, num_slots, filled)
        entropy = torch.special.entr(weights).sum(-1)  # B H T
        slots = (weights > 0).any(2).sum(-1)[..., None].clamp(min=1)
        breadth = (entropy.exp() / slots).mean((0, 2))
        windows.append(Look(weights.mean((0, 2)).cpu(), breadth.cpu()))


def weights_of(attention, q, k, num_slots, filled) -> Tensor:
    """q: B H T K; k: B H J K -> how the queries attend to the slots of the queue, B H T J."""
    bias = attention.with_empty(None, num_slots, filled)
    scores = q @ k.transpose(-1, -2) + (0 if bias is None else bias)
    return attention.where_seeing(scores.float().softmax(-1), bias)


def layer_row(model, layer: int, looks: list[Look]) -> dict[str, Any]:
    """What one layer's windows looked at, and its gate."""
    share = 1 - model.model.layers[layer].gate.detach().sigmoid().float().cpu()
    weights = torch.stack([look.weights for look in looks])
    ratios = ratios_by_age(weights, model.config.num_long_memory_tokens)
    breadth = torch.stack([look.breadth for look in looks[1:]])  # the first finds it empty
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
    """N H J, oldest slot first -> H A, the ages that some window has seen."""
    by_age = weights.unflatten(2, (-1, slots_per_window)).sum(3).flip(2)  # N H Q
    held = torch.arange(len(weights)).clamp(max=by_age.shape[2])  # windows in the queue
    seen = torch.arange(by_age.shape[2]) < held[:, None]
    ratios = (by_age * held[:, None, None] * seen[:, None]).sum(0) / seen.sum(0).clamp(min=1)
    return ratios[:, : int(held.max())]


def powers_of_two(end: int) -> list[int]:
    return [2**i for i in range(end.bit_length())]


def refuse_unmeasurable(config, num_tokens: int) -> None:
    if not getattr(config, "long_memory_layers", ()):
        raise ValueError(
            f"this {config.model_type} model has no queue (long_memory_layers is empty or unknown "
            "to it): there is no attention to it to show"
        )
    slots, pushed = config.long_memory_length, config.num_long_memory_tokens
    if not pushed or slots % pushed:
        raise ValueError(
            f"the queue holds {slots} tokens and each window pushes {pushed}: entries have an age "
            "only if it holds those of whole windows"
        )
    if num_tokens < 2 * config.window_length:
        raise ValueError(
            f"the document has {num_tokens} tokens: give at least {2 * config.window_length}, two "
            "windows, or nothing is in the queue"
        )
