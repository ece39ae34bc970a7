"""Read a document once, however long it is, in constant memory.

    source  ->  parts, B t each  ->  pieces, B piece_length each  ->  the model, and its memory

A source is consumed lazily and nothing of it is kept: what is held is one part, one piece and the
cache. Where the source is cut into parts changes nothing: windows are counted in tokens, and text
is encoded with the characters around it:

    text  | context |   block   | context |     a token is given with the block that it begins in,
          |<------- encoded once -------->|     so that each is given once
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, groupby, islice
from numbers import Integral
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.cache_utils import Cache

from .cache import MelodiCache
from .refusals import refuse_unknown_ids
from .versions import choose_cache

PIECE_WINDOWS = 8  # windows that one call reads unless told otherwise
PROGRESS_DELAY = 3  # seconds of work before a bar appears
BLOCK = 65_536  # characters that are encoded at once
CONTEXT = 1_024  # characters on either side that a token may depend on


@torch.no_grad()  # not inference mode: generate() goes on to write into the cache
def read_document(
    model,
    source,
    *,
    tokenizer=None,
    cache: MelodiCache | None = None,
    piece_length: int | None = None,
    add_special_tokens: bool = True,
    progress: bool | None = True,
    past_key_values: MelodiCache | None = None,
) -> MelodiCache:
    """Read a document of any length in constant memory; the result is a cache for more reading and
    for `generate`.

    source: ids, as a tensor or an array (T or B T) or a list of integers; or a string; or anything
        that yields a document in parts, be it a generator or a text file: ids (T or B T), single
        integers and strings, in any order.
    tokenizer: for strings, a fast one with the model's vocabulary. Strings are joined as they are
        (lines keep their ends) and read by one row; what looks like a special token in them is
        read as characters. The ids are those of the whole text at once, given that a token
        depends on no character farther away than `CONTEXT`, as with tokenizers that split text
        into words first.
    add_special_tokens: a text that begins a document is preceded by what the tokenizer puts before
        texts or, if that is nothing, by the config's `bos_token_id`. Nothing is put behind it.
    cache, past_key_values: two names of what was read before, to continue from; it is written to
        and returned. Whatever stops the reading, it holds the pieces read until then.
    piece_length: tokens of each row that one call of the model reads; changes time and memory
        needed, not the result.
    progress: a bar with tokens per second, once it takes long; None: on a terminal only.

    Raises `ValueError` for a document without tokens, ids outside the vocabulary, sources that
    could be misread, rows that change in number, a tokenizer that is missing, slow or too large,
    and a model that would read with dropout. Errors of the source itself pass unchanged.
    """
    refuse_dropout(model)
    given = choose_cache(cache, past_key_values)
    cache = MelodiCache(model.config) if given is None else given
    length = piece_columns(piece_length, model.config)
    begins = add_special_tokens and columns_read(cache) == 0
    encode = text_encoder(tokenizer, model.config, begins)
    columns = 0
    bar = tqdm(
        desc="reading",
        total=source.numel() if isinstance(source, Tensor) else None,
        unit="token",
        unit_scale=True,
        dynamic_ncols=True,
        delay=PROGRESS_DELAY,
        disable=None if progress is None else not progress,
    )
    with bar:
        for piece in pieces_of(parts_of(source, encode, length), length):
            try:
                refuse_unknown_ids(piece, model.config.vocab_size)
                ids = piece.to(model.device, torch.long)
                model(ids, cache=cache, use_cache=True, logits_to_keep=1)
            except ValueError as error:
                raise ValueError(f"{error} ({what_is_kept(columns, given)})") from error
            columns += piece.shape[1]
            bar.update(piece.numel())
    if columns == 0:
        raise ValueError("the document is empty: give at least 1 token")
    return cache


def what_is_kept(columns, cache):
    """The end of an error message."""
    if cache is not None:
        return f"of this document {columns:,} tokens per row were read, into the given cache"
    return (
        f"{columns:,} tokens per row were read before; to keep such a beginning, give a "
        f"MelodiCache as cache"
    )


def refuse_dropout(model):
    """What was read with dropout would be another memory every time."""
    rates = {name: getattr(model.config, name) for name in ("dropout", "attention_dropout")}
    if model.training and any(rates.values()):
        shown = ", ".join(f"{name}={rate}" for name, rate in rates.items())
        raise ValueError(
            f"the model is in training mode with {shown}: call model.eval() before reading, "
            f"model.train() after"
        )


def columns_read(cache):
    if not isinstance(cache, Cache):
        raise ValueError(
            f"cache is a {type(cache).__name__}: give MelodiCache(model.config), what an "
            f"earlier call returned, or nothing"
        )
    return int(cache.get_seq_length())


def piece_columns(piece_length, config):
    if piece_length is None:
        return PIECE_WINDOWS * config.window_length
    if not isinstance(piece_length, Integral) or piece_length < 1:
        raise ValueError(
            f"piece_length is {piece_length!r}: it must be a whole number of tokens, 1 or more, "
            f"best a multiple of window_length={config.window_length}"
        )
    return int(piece_length)


# Sources


def parts_of(source, encode, length) -> Iterator[Tensor]:
    """The ids of a source in its order: B t each, t at most `length` unless it was a string.

    encode: from an iterable of strings, and whether the source begins with them, to such ids.
    """
    for i, (kind, parts) in enumerate(groupby(stream_of(source), key=kind_of)):
        if kind is str:
            yield from encode(parts, i == 0)
        elif kind is Integral:
            while numbers := list(islice(parts, length)):
                yield torch.tensor([numbers])
        else:
            for ids in parts:
                yield from columns_of(ids, length)


def pieces_of(parts: Iterable[Tensor], length: int) -> Iterator[Tensor]:
    """Parts of any length as pieces of `length` columns; the last piece may be shorter."""
    held: list[Tensor] = []
    columns = 0
    for part in parts:
        if held and len(part) != len(held[0]):
            raise ValueError(
                f"the source gives {len(part)} rows after parts of {len(held[0])}: each part must "
                f"continue the same rows"
            )
        held.append(part)
        columns += part.shape[1]
        if columns >= length:
            joined, whole = torch.cat(held, dim=1), columns - columns % length
            yield from joined[:, :whole].split(length, dim=1)
            held, columns = [joined[:, whole:]], columns - whole
    if columns:
        yield torch.cat(held, dim=1)


def stream_of(source) -> Iterable[Any]:
    """The parts of a source; what could be misread is refused."""
    if isinstance(source, str) or is_array(source):
        return [source]
    if isinstance(source, list | tuple):
        first = source[0] if source else 0
        if isinstance(first, str | list | tuple):
            raise ValueError(
                f"the source is a {type(source).__name__} of {type(first).__name__}, which could "
                f"be several documents: give their ids as one tensor (rows, tokens), or, if they "
                f"are parts of one document, iter(source)"
            )
        return [source] if isinstance(first, Integral) else source
    if isinstance(source, Mapping):
        raise ValueError(f"the source is a {type(source).__name__}: give its input_ids")
    if isinstance(source, PathLike):
        raise ValueError(
            f"the source is the path {str(source)!r}: give an open text file, "
            f'open({str(source)!r}, encoding="utf-8")'
        )
    if isinstance(source, bytes | bytearray) or not isinstance(source, Iterable):
        raise ValueError(
            f"the source is a {type(source).__name__}, {source!r:.60}: give ids (a tensor or list "
            f"of integers), a string, or what yields a document in such parts"
        )
    return source


def kind_of(part) -> type:
    """How a part is read: as a string, an integer, or a tensor of them."""
    if isinstance(part, str):
        return str
    if isinstance(part, Integral):
        return Integral
    if is_array(part) or isinstance(part, list | tuple):
        return Tensor
    raise ValueError(
        f"the source gives a {type(part).__name__}, {part!r:.60}: give ids (a tensor or list of "
        f"integers) or strings (files opened in text mode)"
    )


def is_array(part):
    """A tensor, or an array of NumPy, which may lie in a file."""
    return hasattr(part, "dtype") and hasattr(part, "ndim") and not isinstance(part, Integral)


def columns_of(ids, length) -> Iterator[Tensor]:
    """Ids (T or B T) as tensors B t, t at most `length`."""
    if isinstance(ids, list | tuple):
        try:
            ids = torch.tensor(ids, dtype=None if ids else torch.long)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the source gives a list that is not one of ids: {error}") from error
    is_whole = str(ids.dtype).removeprefix("torch.").lstrip("u").startswith("int")
    if not is_whole or ids.ndim > 2:
        raise ValueError(
            f"the source gives ids of type {ids.dtype} and shape {tuple(ids.shape)}: they must be "
            f"integers, tokens or rows and tokens"
        )
    ids = ids.reshape(1, -1) if ids.ndim < 2 else ids
    for begin in range(0, ids.shape[1], length):
        part = ids[:, begin : begin + length]
        # A copy of an array: torch warns about those that must not be written to.
        yield part.long() if isinstance(part, Tensor) else torch.tensor(part.astype("int64"))


# Text


def text_encoder(tokenizer, config, begins) -> Callable[[Iterable[str], bool], Iterator[Tensor]]:
    """What encodes the parts of a text, 1 t each; `begins`: the source begins a document."""
    if tokenizer is None:
        return refuse_text
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say where in the text its tokens lie: give a "
            f"fast tokenizer, or ids"
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's vocabulary "
            f"{config.vocab_size}: use the tokenizer that was saved with the model"
        )
    # A copy, because these switches belong to the tokenizer that the user keeps.
    backend = copy.deepcopy(backend)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    prefix = document_prefix(backend, config) if begins else []

    def encode(texts, is_first):
        before = prefix if is_first else []
        for ids in text_ids(texts, backend):
            if ids:
                yield torch.tensor([before + ids])
                before = []

    return encode


def refuse_text(texts, is_first):
    raise ValueError(f"the source gives text, {next(iter(texts))!r:.60}: give tokenizer= as well")


def document_prefix(backend, config) -> list[int]:
    """The ids before a document's first word."""
    sample = backend.encode("a")
    num_special = [*sample.special_tokens_mask, 0].index(0)
    begin = [] if config.bos_token_id is None else [config.bos_token_id]
    return sample.ids[:num_special] or begin


def text_ids(texts: Iterable[str], backend) -> Iterator[list[int]]:
    """The ids of a text that comes in parts, block by block."""
    text, begin = "", 0  # what is held, and where in it the tokens begin that were not given yet
    for part in chain.from_iterable(map(blocks_of, texts)):
        text += part
        if len(text) < begin + BLOCK + CONTEXT:
            continue
        end = len(text) - CONTEXT
        yield tokens_between(begin, end, backend.encode(text, add_special_tokens=False))
        text, begin = text[end - CONTEXT :], CONTEXT
    yield tokens_between(begin, len(text) + 1, backend.encode(text, add_special_tokens=False))


def blocks_of(text: str) -> Iterator[str]:
    for begin in range(0, len(text), BLOCK):
        yield text[begin : begin + BLOCK]


def tokens_between(begin, end, encoded) -> list[int]:
    """Ids of the tokens that begin at the characters `begin` to `end` - 1."""
    places = zip(encoded.ids, encoded.offsets, strict=True)
    return [token for token, (start, _) in places if begin <= start < end]
