"""Read a document once, however long it is, in constant memory.

    source  ->  parts, B t each  ->  pieces, B piece_length each  ->  the model, and its memory

Documents of different lengths are read side by side, each a row; the shorter ones are padded.

A source is consumed lazily and nothing of it is kept: what is held is one part, one piece and the
cache. Where the source is cut into parts changes nothing: windows are counted in tokens, and text
is encoded with the characters around it:

    text  | context |   block   | context |     a token is given with the block that it begins in,
          |<------- encoded once -------->|     so that each is given once
"""

import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby, islice, zip_longest
from numbers import Integral
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .cache import MelodiCache, check_cache
from .refusals import refuse_dropout, refuse_unknown_ids
from .versions import choose_cache

PIECE_WINDOWS = 8  # windows that one call reads unless told otherwise
PROGRESS_DELAY = 3  # seconds of work before a bar appears
BLOCK = 65_536  # characters that are encoded at once
CONTEXT = 1_024  # characters on either side that a token may depend on
LONGEST_PATH = 1_024  # characters of a string that may be meant as a path
SUFFIXES = (".txt", ".md", ".html", ".pdf", ".json", ".jsonl", ".gz", ".parquet")  # of text files


@torch.no_grad()  # not inference mode: generate() goes on to write into the cache
def read_document(  # noqa: PLR0913
    model,
    source,
    *,
    attention_mask=None,
    tokenizer=None,
    cache: MelodiCache | None = None,
    piece_length: int | None = None,
    add_special_tokens: bool = True,
    progress: bool | None = True,
    past_key_values: MelodiCache | None = None,
) -> MelodiCache:
    """Read a document of any length in constant memory; the result is a cache for more reading and
    for `generate`.

    source: one of
        - ids, as a tensor or an array (T or B T) or a list of integers. Padding is not recognised
          by its id: pass attention_mask, or a list of documents.
        - a string.
        - a `pathlib.Path` of a text file in UTF-8. A string that names a file is refused.
        - a list of documents of any lengths, each one of these kinds: they are read side by side,
          and row i of the cache is that of document i.
        - what a tokenizer returns, a mapping with input_ids and perhaps attention_mask.
        - any other iterable (a generator, an open text file, a tuple of tensors): the parts of one
          document, ids (T or B T), single integers and strings, in any order.
    attention_mask: for ids with padding, of their shape, 1 at tokens and 0 at padding, wherever it
        lies. Each row reads its tokens as if it were alone.
    tokenizer: for strings, a fast one with the model's vocabulary. The parts of a text are joined
        as they are (lines keep their ends). The ids are those of the whole text at once,
        `tokenizer(text)`, special tokens in the text included, given that a token depends on no
        character farther away than `CONTEXT`, as with tokenizers that split text into words first.
    add_special_tokens: a text that begins a document is preceded by what the tokenizer puts before
        texts or, if that is nothing, by the config's `bos_token_id`, unless it begins with it.
        Nothing is put behind it.
    cache, past_key_values: two names of what was read before, to continue from; it is written to
        and returned. Whatever stops the reading, it holds the pieces read until then.
    piece_length: tokens of each row that one call of the model reads; changes time and memory
        needed, not the result.
    progress: a bar with tokens per second, once it takes long; None: on a terminal only.

    Raises `ValueError` for a document without tokens, ids outside the vocabulary, sources that
    could be misread, rows that change in number, a file that is not UTF-8, a tokenizer that is
    missing, slow or too large, and a model that would read with dropout. Errors of the source
    itself pass unchanged.
    """
    refuse_dropout(model)
    given = choose_cache(cache, past_key_values)
    cache = MelodiCache(model.config) if given is None else given
    length = piece_columns(piece_length, model.config)
    check_cache(cache, model.config.num_hidden_layers)
    is_first = int(cache.get_seq_length()) == 0
    encode = text_encoder(tokenizer, model.config, add_special_tokens and is_first)
    if isinstance(source, Mapping):
        source, attention_mask = ids_and_mask(source, attention_mask)
    pieces: Iterator[tuple[Tensor, Tensor | None]]
    if attention_mask is not None:
        pieces = masked_pieces(source, attention_mask, length, is_first)
    elif is_batch(source):
        pieces = batch_pieces(source, encode, length, is_first)
    else:
        pieces = ((ids, None) for ids in pieces_of(parts_of(source, encode, length), length))
    columns = 0
    bar = tqdm(
        desc="reading",
        total=number_of_tokens(source, attention_mask),
        unit="token",
        unit_scale=True,
        dynamic_ncols=True,
        delay=PROGRESS_DELAY,
        disable=None if progress is None else not progress,
    )
    with bar:
        for piece, mask in pieces:
            try:
                refuse_unknown_ids(piece, model.config.vocab_size)
                ids = piece.to(model.device, torch.long)
                if mask is not None:
                    mask = mask.to(model.device)
                model(ids, attention_mask=mask, cache=cache, use_cache=True, logits_to_keep=1)
            except ValueError as error:
                raise ValueError(f"{error} ({what_is_kept(columns, given)})") from error
            columns += piece.shape[1]
            bar.update(number_of_tokens(piece, mask))
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


def number_of_tokens(ids, mask):
    """How many tokens ids or their mask have, None if that is not known."""
    if isinstance(mask, Tensor):
        return int(mask.sum())
    return ids.numel() if isinstance(ids, Tensor) else None


def ids_and_mask(encoding, attention_mask):
    """The ids and the mask of what a tokenizer returned."""
    if "input_ids" not in encoding:
        raise ValueError(
            f"the source is a {type(encoding).__name__} with {', '.join(map(str, encoding))}: it "
            f"must have input_ids"
        )
    ids = encoding["input_ids"]
    mask = encoding.get("attention_mask") if attention_mask is None else attention_mask
    if mask is not None and is_batch(ids) and len({len(row) for row in ids}) > 1:
        # Rows of different lengths have no padding between them, but each may have its own.
        pairs = zip(ids, mask, strict=True)
        return [[i for i, keep in zip(*pair, strict=True) if keep] for pair in pairs], None
    return ids, mask


def masked_pieces(ids, mask, length, is_first) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of ids (T or B T) with padding, and of their mask."""
    ids, mask = as_array("the source", ids), as_array("attention_mask", mask)
    mask = torch.tensor(mask) if not isinstance(mask, Tensor) else mask
    if tuple(ids.shape) != tuple(mask.shape):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} and the ids {tuple(ids.shape)}: give 1 "
            f"for each token and 0 for each id of padding"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask holds numbers other than 0 and 1: give 1 at tokens")
    has_tokens = (mask if mask.dim() == 2 else mask.reshape(1, -1)).bool().any(1)
    if is_first and not has_tokens.all():
        row = has_tokens.tolist().index(False)
        raise ValueError(f"attention_mask has no token in row {row}: give at least 1 in each row")
    yield from zip(columns_of(ids, length), columns_of(mask.long(), length), strict=True)


def as_array(name, given):
    """Ids or a mask, one number for each column, as a tensor or an array."""
    if is_array(given):
        return given
    try:
        return torch.tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} is a {type(given).__name__} that is no batch of integers ({error}): with an "
            f"attention_mask give ids and mask as tensors or lists of one shape"
        ) from error


def is_batch(source):
    """Whether a source is a list of documents; a list of integers is one document."""
    is_list = isinstance(source, Sequence) and not isinstance(source, str | tuple | range)
    if not is_list or is_array(source) or isinstance(source, bytes | bytearray) or not source:
        return False
    first = source[0]
    return not (isinstance(first, Integral) or (is_array(first) and first.ndim == 0))


def batch_pieces(documents, encode, length, is_first) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of several documents, a row for each, padded behind those that have ended."""
    nothing = torch.zeros(1, 0, dtype=torch.long)
    rows = [pieces_of(parts_of(document, encode, length), length) for document in documents]
    for pieces in zip_longest(*rows, fillvalue=nothing):
        for i, piece in enumerate(pieces):
            if is_first and piece is nothing:
                raise ValueError(f"document {i} of the list is empty: give at least 1 token")
            if len(piece) != 1:
                raise ValueError(
                    f"document {i} of the list has {len(piece)} rows: give each a row of its own; "
                    f"if the list holds parts of one batch, give iter(source)"
                )
        is_first, width = False, max(piece.shape[1] for piece in pieces)
        ids = torch.cat([nn.functional.pad(p.cpu(), (0, width - p.shape[1])) for p in pieces])
        lengths = torch.tensor([[piece.shape[1]] for piece in pieces])
        yield ids, (torch.arange(width) < lengths).long()


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
    if isinstance(source, PathLike):
        return text_of(source)
    if isinstance(source, str):
        refuse_path(source)
        return [source]
    if is_array(source):
        return [source]
    if isinstance(source, list | tuple):
        first = source[0] if source else 0
        if is_batch(source) or isinstance(first, str | list | tuple):
            raise ValueError(
                f"the source is a {type(source).__name__} of {type(first).__name__}, which could "
                f"be several documents or one: for several give one list of them; for parts of "
                f"one, iter(source)"
            )
        return [source] if isinstance(first, Integral) else source
    if isinstance(source, Mapping):
        raise ValueError(f"a document is a {type(source).__name__}: give its input_ids")
    if isinstance(source, bytes | bytearray) or not isinstance(source, Iterable):
        raise ValueError(
            f"the source is a {type(source).__name__}, {source!r:.60}: give ids (a tensor or list "
            f"of integers), a string, or what yields a document in such parts"
        )
    return source


def refuse_path(text):
    """Refuse a string that was perhaps meant as the path of a file."""
    if len(text) > LONGEST_PATH or "\n" in text:
        return
    if os.path.isfile(text) or (text.endswith(SUFFIXES) and not re.search(r"\s", text)):
        raise ValueError(
            f"the source is the string {text!r}, which may be a path: to read the file give "
            f"pathlib.Path({text!r}), to read these {len(text)} characters give iter([{text!r}])"
        )


def text_of(path) -> Iterator[str]:
    """The text of a file in UTF-8, block by block."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            while block := file.read(BLOCK):
                yield block
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{os.fspath(path)} is not text in UTF-8 ({error}): give "
                f"open({os.fspath(path)!r}, encoding=...) with its encoding"
            ) from error


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
    if not is_whole or ids.ndim > 2 or (ids.ndim == 2 and len(ids) == 0):
        raise ValueError(
            f"the source gives ids of type {ids.dtype} and shape {tuple(ids.shape)}: they must be "
            f"integers, tokens or rows and tokens, of at least 1 row"
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
    backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    prefix = document_prefix(backend)
    bos = None if prefix else config.bos_token_id

    def encode(texts, is_first):
        before = prefix if begins and is_first else []
        for ids in filter(None, text_ids(texts, backend)):
            if begins and is_first and bos is not None and ids[0] != bos:
                before = [bos]
            yield torch.tensor([before + ids])
            is_first, before = False, []

    return encode


def refuse_text(texts, is_first):
    raise ValueError(f"the source gives text, {next(iter(texts))!r:.60}: give tokenizer= as well")


def document_prefix(backend) -> list[int]:
    """The ids that the tokenizer puts before a text."""
    sample = backend.encode("a")
    return sample.ids[: [*sample.special_tokens_mask, 0].index(0)]


def text_ids(texts: Iterable[str], backend) -> Iterator[list[int]]:
    """The ids of a text that comes in parts, block by block."""
    text, begin = "", 0  # what is held, and where in it the tokens begin that were not given yet
    for part in chain.from_iterable(map(blocks_of, texts)):
        text += part
        if len(text) < begin + BLOCK + CONTEXT:
            continue
        end = len(text) - CONTEXT
        yield tokens_between(begin, end, encoded(text, backend))
        text, begin = text[end - CONTEXT :], CONTEXT
    yield tokens_between(begin, len(text) + 1, encoded(text, backend))


def encoded(text: str, backend):
    """A text as the tokenizer has it, without what it puts around texts."""
    if found := re.search("[\ud800-\udfff]", text):
        raise ValueError(
            f"the text holds {found.group()!r} after {text[: found.start()][-20:]!r}, half of a "
            f"surrogate pair, which is no character: decode the source with errors='replace'"
        )
    return backend.encode(text, add_special_tokens=False)


def blocks_of(text: str) -> Iterator[str]:
    for begin in range(0, len(text), BLOCK):
        yield text[begin : begin + BLOCK]


def tokens_between(begin, end, encoding) -> list[int]:
    """Ids of the tokens that begin at the characters `begin` to `end` - 1."""
    places = zip(encoding.ids, encoding.offsets, strict=True)
    return [token for token, (start, _) in places if begin <= start < end]
