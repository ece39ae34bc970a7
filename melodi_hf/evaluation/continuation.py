"""Continue a document of any length: read it in pieces, then generate from the memory alone.

    ids  [ piece | piece | piece | ... | last ]      one piece at a time into the cache
                                           \\__ generate() from the cache

Only the cache is kept, and its size does not depend on the length of the document.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from melodi_hf.data.text import EMPTY, Document, invalid_reason
from melodi_hf.data.tokens import encode_documents
from melodi_hf.models.cache import MelodiCache


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    max_new_tokens: int,
    **options: Any,
) -> tuple[str, dict[str, Any]]:
    """Continue a text, which is read like a document in training, after a start token."""
    problem = invalid_reason(text)
    if problem == EMPTY:
        raise ValueError("the prompt is empty: pass at least one character")
    if problem:
        raise ValueError(f"the prompt is {problem}: pass a str without halves of surrogate pairs")
    (document,) = encode_documents([Document("prompt", text)], tokenizer, progress=False)
    ids = [tokenizer.eos_token_id, *document.ids.tolist()]  # every document begins with eos
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
    """Read the ids in pieces and generate; return the new ids and speeds."""
    ids = torch.as_tensor(ids, dtype=torch.long, device=model.device)
    check_ids(ids, model.config.vocab_size)
    start = perf_counter()
    cache = read(model, ids[:-1], piece_windows * model.config.window_length, progress)
    read_seconds = perf_counter() - start
    output = model.generate(  # type: ignore[operator]  # torch's annotations hide the method
        ids[None, -1:],
        # of the full length, so that generate() continues the cache
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


@torch.no_grad()  # not inference mode: generate() writes to the cache later
def read(model: PreTrainedModel, ids: Tensor, piece_length: int, progress: bool) -> MelodiCache:
    """Read the ids and return the cache."""
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


def check_ids(ids: Tensor, vocab_size: int) -> None:
    if ids.ndim != 1 or not len(ids):
        raise ValueError(f"ids have shape {ids.shape}: pass one row of at least one token")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"the ids range from {low} to {high}, but the model's vocabulary is 0 to "
            f"{vocab_size - 1}: use the tokenizer of the model"
        )
