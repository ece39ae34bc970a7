"""Continue a document of any length: read it in pieces, then generate from the memory alone.

    ids  [ piece | piece | piece | ... | last ]      one piece at a time through the cache
                                           \\__ generate(), whose past is the cache

What is held of the document is the cache, whose size does not grow with what was read.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from melodi_hf.data.text import EMPTY, Document, trouble_of
from melodi_hf.data.tokens import encode_documents
from melodi_hf.models.cache import MelodiCache


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    max_new_tokens: int,
    **options: Any,
) -> tuple[str, dict[str, Any]]:
    """Continue a text that is read as a document is in training, from the start token on."""
    trouble = trouble_of(text)
    if trouble == EMPTY:
        raise ValueError("the prompt is empty: there is nothing to continue")
    if trouble:
        raise ValueError(f"the prompt is {trouble}: give a str without halves of surrogate pairs")
    (document,) = encode_documents([Document("prompt", text)], tokenizer, progress=False)
    ids = [tokenizer.eos_token_id, *document.ids.tolist()]  # eos begins every document
    new_ids, info = read_and_continue(model, ids, max_new_tokens, **options)
    return str(tokenizer.decode(new_ids, skip_special_tokens=True)), info


def read_and_continue(
    model: PreTrainedModel,
    ids: Sequence[int] | Tensor,
    max_new_tokens: int,
    *,
    piece_windows: int = 8,
    progress: bool = True,
    **generate_options: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Read all ids but the last in pieces, generate behind them; the new ids and what it took."""
    ids = torch.as_tensor(ids, dtype=torch.long, device=model.device)
    refuse_unreadable(ids, model.config.vocab_size)
    start = perf_counter()
    cache = read(model, ids[:-1], piece_windows * model.config.window_length, progress)
    read_seconds = perf_counter() - start
    output = model.generate(  # type: ignore[operator]  # torch's annotations hide the method
        ids[None, -1:],
        # of the full length: it tells generate() that the ids continue the cache
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=ids.device),
        cache=cache,
        max_new_tokens=max_new_tokens,
        **generate_options,
    )
    new_ids = output[0, 1:]
    seconds = perf_counter() - start
    return new_ids, {
        "tokens_read": len(ids),
        "tokens_generated": len(new_ids),
        "memory_bytes": cache.memory_bytes(),
        "seconds": seconds,
        "read_tokens_per_second": len(ids) / read_seconds,
        "generated_tokens_per_second": len(new_ids) / (seconds - read_seconds),
    }


@torch.no_grad()  # not inference mode: generate() goes on to write into the cache
def read(model: PreTrainedModel, ids: Tensor, piece_length: int, progress: bool) -> MelodiCache:
    """The memory of a model that has read the ids."""
    cache = MelodiCache(model.config)
    bar = tqdm(
        desc="reading",
        total=len(ids),
        unit="tok",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not progress,
    )
    with bar:
        for piece in ids.split(piece_length):
            if len(piece):
                model(piece[None], cache=cache, use_cache=True, logits_to_keep=1)
                bar.update(len(piece))
    return cache


def refuse_unreadable(ids: Tensor, vocab_size: int) -> None:
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"ids should be one row of at least one token; their shape is {ids.shape}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"the ids go from {low} to {high}, but the model's vocabulary is 0 to "
            f"{vocab_size - 1}: were they encoded with another tokenizer?"
        )
