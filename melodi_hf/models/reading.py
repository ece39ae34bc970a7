"""Read a document of any length in constant memory.

    source  ->  parts, B t each  ->  pieces, B piece_length each  ->  calls of the model

A source is consumed lazily; how it is cut into parts changes nothing. Text is encoded in blocks:

    text  | context |   block   | context |     encoded at once; the block's tokens are kept

The ids are those of `tokenizer(text)` if no token depends on characters more than `CONTEXT` away,
as with tokenizers that split text into words first.
"""

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, islice, zip_longest
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

from .cache import MelodiCache, check_cache
from .validation import check_dropout, check_token_ids, choose_cache, require

PIECE_WINDOWS = 8  # windows per call of the model by default
PROGRESS_DELAY = 3  # seconds before the progress bar appears
BLOCK = 65_536  # characters that are encoded at once
CONTEXT = 1_024  # characters on either side that a token may depend on
FILE_NAME = re.compile(r"\S*\.(txt|md|html|pdf|json|jsonl|gz|parquet)")
ARRAYS = (Tensor, np.ndarray)  # an array may be a memory-mapped file
NO_LISTS = (str, bytes, bytearray, tuple, range)


@torch.no_grad()  # not inference mode: generate() writes to the cache later
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
    """Read a document of any length in constant memory and return the cache.

    source: ids (a tensor or an array, T or B T, or a list of integers); a string; a `pathlib.Path`
        of a text file in UTF-8; a list of such documents of any lengths, one for each row; what a
        tokenizer returns (a mapping with input_ids); or any other iterable (a generator, an open
        text file, a tuple of tensors) of the parts of one document: ids, integers and strings.
    attention_mask: of the shape of the ids, 1 at tokens and 0 at padding, which may be anywhere.
    tokenizer: for strings, a fast tokenizer with the model's vocabulary.
    cache, past_key_values: two names of a cache to continue from, written to and returned.
    piece_length: tokens per row and call of the model; the result does not depend on it.
    add_special_tokens: precede text at the beginning of a document by what the tokenizer puts
        before texts or, if that is nothing, by `bos_token_id` unless the text begins with it.
    progress: whether to show a progress bar if reading takes long; None: on a terminal only.

    Raises `ValueError` for an empty document, ids outside the vocabulary, ambiguous sources (such
    as the name of a file), rows that change in number, files that are not UTF-8, a tokenizer that
    is missing, slow or too large, and dropout. Errors of the source pass unchanged. After an
    error the cache holds the pieces that were read before.
    """
    check_dropout(model)
    cache, window = choose_cache(cache, past_key_values), model.config.window_length
    cache = MelodiCache(model.config) if cache is None else cache
    length: Any = PIECE_WINDOWS * window if piece_length is None else piece_length
    message = f"piece_length is {length!r}: it must be a whole number of tokens, 1 or more, best"
    is_length = isinstance(length, Integral) and int(length) >= 1
    require(is_length, f"{message} a multiple of window_length={window}")
    check_cache(cache, model.config.num_hidden_layers)
    is_new = int(cache.get_seq_length()) == 0
    encode = text_encoder(tokenizer, model.config, all((add_special_tokens, is_new)))
    pieces, total = pieces_and_total(source, attention_mask, encode, int(length), is_new)
    read_pieces(model, cache, pieces, total, progress)
    return cache


def read_pieces(model, cache, pieces, total, progress):
    """Call the model on each piece, a dict of its ids and perhaps their mask."""
    how = {"unit": "token", "unit_scale": True, "dynamic_ncols": True, "delay": PROGRESS_DELAY}
    columns, hidden = 0, {True: False, False: True}.get(progress)  # None: tqdm decides
    with tqdm(desc="reading", total=total, disable=hidden, **how) as bar:
        for piece in pieces:
            ids = piece["input_ids"]
            try:
                check_token_ids(ids, model.config.vocab_size)
                inputs = {name: x.to(model.device, torch.long) for name, x in piece.items()}
                model(**inputs, cache=cache, use_cache=True, logits_to_keep=1)
            except ValueError as error:
                kept = (
                    f"{columns:,} tokens per row were read before, into the cache if you passed one"
                )
                raise ValueError(f"{error} ({kept})") from error
            columns += ids.shape[1]
            bar.update(int(piece.get("attention_mask", torch.ones(ids.shape)).sum()))
    require(columns, "the document is empty: give at least 1 token")


def look_up(table, value):
    """Return the entry of the first row (types, entry) whose types include that of `value`."""
    return next(entry for types, entry in table if isinstance(value, types))


def pieces_and_total(source, mask, encode, length, is_new):
    """Return the pieces of a source, and its number of tokens if that is known."""
    if isinstance(source, Mapping):
        found = f"the source is a {type(source).__name__} with {', '.join(map(str, source))}"
        require("input_ids" in source, f"{found}: it must have input_ids")
        mask = source.get("attention_mask") if mask is None else mask
        source = source["input_ids"]
        if mask is not None and is_batch(source) and len(set(map(len, source))) > 1:
            # Rows of different lengths are not padded to one length, but may hold padding.
            rows = [zip(*row, strict=True) for row in zip(source, mask, strict=True)]
            source, mask = [[i for i, keep in row if keep] for row in rows], None
    if mask is not None:
        return masked_pieces(source, mask, length, is_new)
    if is_batch(source):
        return batch_pieces(source, encode, length, is_new), None
    pieces = pieces_of(parts_of(source, encode, length), length)
    return ({"input_ids": ids} for ids in pieces), getattr(source, "numel", lambda: None)()


def masked_pieces(ids, mask, length, is_new):
    """Return the pieces of ids with padding (T or B T), and their number of tokens."""
    ids, mask = as_array("the source", ids), as_array("attention_mask", mask)
    mask, shape = torch.asarray(mask, copy=True), tuple(ids.shape)
    found = f"attention_mask has shape {tuple(mask.shape)} and the ids {shape}"
    require(shape == tuple(mask.shape), f"{found}: give 1 for each token and 0 for padding")
    is_binary = ((mask == 0) | (mask == 1)).all()
    require(is_binary, "attention_mask holds numbers other than 0 and 1: give 1 at tokens")
    counts = torch.atleast_2d(mask).flatten(1).sum(1)
    check_counts(counts, is_new, "attention_mask has no token in row {}: give at least 1 per row")
    pairs = zip(columns_of(ids, length), columns_of(mask.long(), length), strict=True)
    return ({"input_ids": x, "attention_mask": keep} for x, keep in pairs), int(mask.sum())


def batch_pieces(documents, encode, length, is_new) -> Iterator[dict[str, Tensor]]:
    """Yield the pieces of several documents, one row for each, padded on the right."""
    rows = [pieces_of(parts_of(document, encode, length), length) for document in documents]
    for pieces in zip_longest(*rows, fillvalue=torch.zeros(1, 0, dtype=torch.long)):
        for i, piece in enumerate(pieces):
            found = f"document {i} of the list has {len(piece)} rows: give each a row of its own"
            require(len(piece) == 1, f"{found}; if these are parts of one batch, give iter(source)")
        counts = torch.tensor([piece.shape[1] for piece in pieces])
        check_counts(counts, is_new, "document {} of the list is empty: give at least 1 token")
        is_new, width = False, int(counts.max())
        ids = torch.cat([pad(piece.cpu(), (0, width - piece.shape[1])) for piece in pieces])
        yield {"input_ids": ids, "attention_mask": (torch.arange(width) < counts[:, None]).long()}


def check_counts(counts, is_new, message):
    """Raise `ValueError` for a row without tokens at the beginning of documents."""
    row = [*counts.tolist(), 0].index(0)
    require(not is_new or row == len(counts), message.format(row))


def pieces_of(parts: Iterable[Tensor], length: int) -> Iterator[Tensor]:
    """Yield parts of any length as pieces of `length` columns; the last may be shorter."""
    held: list[Tensor] = []
    columns = 0
    for part in parts:
        rows = len((held or [part])[0])
        found = f"the source gives {len(part)} rows after parts of {rows}"
        require(len(part) == rows, f"{found}: each part must continue the same rows")
        held.append(part)
        columns += part.shape[1]
        if columns >= length:
            joined, whole = torch.cat(held, dim=1), columns - columns % length
            yield from joined[:, :whole].split(length, dim=1)
            held, columns = [joined[:, whole:]], columns - whole
    if columns:
        yield torch.cat(held, dim=1)


def is_batch(source):
    """Return whether a source is a list of documents; a list of integers is one document."""
    is_list = isinstance(source, Sequence) and not isinstance(source, NO_LISTS)
    first = next(iter(source), 0) if is_list else 0
    return getattr(first, "ndim", not isinstance(first, Integral)) != 0


def parts_of(source, encode, length) -> Iterator[Tensor]:
    """Yield the ids of a document in their order: B t each."""
    stream = look_up(STREAMS, source)(source)
    for i, (arrays_of, run) in enumerate(groupby(stream, key=partial(look_up, RUNS))):
        if arrays_of is None:
            yield from encode(run, i == 0)
            continue
        for ids in arrays_of(run, length):
            yield from columns_of(ids, length)


def columns_of(ids, length) -> Iterator[Tensor]:
    """Yield ids (T or B T) as tensors B t, t at most `length`."""
    ids = as_array("a part of the source", ids)
    shape, is_whole = ids.shape, re.fullmatch(r"(torch\.)?u?int\d+", str(ids.dtype))
    found = f"the source gives ids of type {ids.dtype} and shape {tuple(shape)}: they must be"
    is_right = all((is_whole, len(shape) < 3, 0 not in shape[:-1]))
    require(is_right, f"{found} integers, tokens or rows and tokens, of at least 1 row")
    ids = ids.reshape((1, 1, *shape)[-2:])
    for start in range(0, ids.shape[1], length):
        part = ids[:, start : start + length]
        # An array is copied: torch warns about arrays that are read-only.
        yield part.long() if isinstance(part, Tensor) else torch.tensor(part.astype("int64"))


def as_array(name, given):
    """Return a list of ids as a tensor, an array unchanged."""
    if isinstance(given, ARRAYS):
        return given
    try:
        return torch.tensor(given, dtype=None if given else torch.long)
    except (TypeError, ValueError, RuntimeError) as error:
        found = f"{name} is a {type(given).__name__} that is no batch of integers ({error})"
        raise ValueError(f"{found}: give a tensor, a list, or lists of one length") from error


def stream_of_text(text):
    """Return a text as one part, unless it may be a path."""
    tests = os.path.isfile, FILE_NAME.fullmatch
    if re.fullmatch(".{,1024}", text) and any(test(text) for test in tests):
        found = f"the source is the string {text!r}, which may be a path: to read the file give"
        remedy = f"to read these {len(text)} characters give iter([{text!r}])"
        raise ValueError(f"{found} pathlib.Path({text!r}), {remedy}")
    return [text]


def stream_of_list(source):
    """Return the parts of a list or tuple."""
    first = next(iter(source), 0)
    found = f"the source is a {type(source).__name__} of {type(first).__name__}, which could be"
    remedy = "for several give one list of them; for parts of one, iter(source)"
    is_clear = not (is_batch(source) or isinstance(first, (str, list, tuple)))
    require(is_clear, f"{found} several documents or one: {remedy}")
    return [source] if isinstance(first, Integral) else source


def stream_of_file(path) -> Iterator[str]:
    """Yield the text of a file in UTF-8, block by block."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            yield from iter(partial(file.read, BLOCK), "")
        except UnicodeDecodeError as error:
            found = f"{os.fspath(path)} is not text in UTF-8 ({error})"
            remedy = f"give open({os.fspath(path)!r}, encoding=...) with its encoding"
            raise ValueError(f"{found}: {remedy}") from error


def refuse(source, verb="is"):
    found = f"the source {verb} a {type(source).__name__}, {source!r:.60}"
    remedy = "give ids (a tensor, a list of integers, input_ids of a mapping), or tokenizer= and"
    raise ValueError(f"{found}: {remedy} text (files opened in text mode)")


STREAMS = (  # types of a document -> from the document to its parts
    (os.PathLike, stream_of_file),
    (str, stream_of_text),
    (ARRAYS, lambda ids: [ids]),
    ((list, tuple), stream_of_list),
    ((Mapping, bytes, bytearray), refuse),
    (Iterable, iter),
    (object, refuse),
)
RUNS = (  # types of a part -> from a run of such parts to arrays or lists of ids; None for text
    (str, None),
    (Integral, lambda numbers, length: iter(lambda: list(islice(numbers, length)), [])),
    ((*ARRAYS, list, tuple), lambda arrays, _: arrays),
    (object, lambda parts, _: refuse(next(parts), "gives")),
)


def text_encoder(tokenizer, config, is_new):
    """Return a function from the parts of a text to ids (1 t); `is_new`: of a new document."""
    if tokenizer is None:
        return lambda texts, _: refuse(next(texts), "gives")
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    size = config.vocab_size
    found = f"{type(tokenizer).__name__} does not say where in the text its tokens are"
    require(backend is not None, f"{found}: give a fast tokenizer, or ids")
    found = f"the tokenizer has {len(tokenizer)} tokens and the model's vocabulary {size}"
    require(len(tokenizer) <= size, f"{found}: use the tokenizer that was saved with the model")
    backend = copy.deepcopy(backend)  # the user's tokenizer keeps its settings
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    sample = backend.encode("a")
    prefix = sample.ids[: [*sample.special_tokens_mask, 0].index(0)]
    bos = [config.bos_token_id][len(prefix) :]

    def encode(texts, is_first):
        blocks = filter(None, text_ids(texts, backend))
        for ids in islice(blocks, is_new & is_first):
            yield torch.tensor([prefix + [i for i in bos if i not in (None, ids[0])] + ids])
        yield from (torch.tensor([ids]) for ids in blocks)

    return encode


def text_ids(texts: Iterable[str], backend) -> Iterator[list[int]]:
    """Yield the ids of a text that comes in parts, block by block."""
    held, start = "", 0  # text, and where in it the tokens begin that were not yielded yet
    for block in (text[i : i + BLOCK] for text in texts for i in range(0, len(text), BLOCK)):
        held += block
        if len(held) >= start + BLOCK + CONTEXT:
            end = len(held) - CONTEXT
            yield ids_between(start, end, held, backend)
            held, start = held[end - CONTEXT :], CONTEXT
    yield ids_between(start, len(held) + 1, held, backend)


def ids_between(start, end, text, backend) -> list[int]:
    """Return the ids of the tokens that begin at characters `start` to `end` - 1 of a text."""
    if found := re.search("[\ud800-\udfff]", text):
        where = f"{found.group()!r} after {text[: found.start()][-20:]!r}, half of a surrogate pair"
        raise ValueError(f"the text holds {where}: decode the source with errors='replace'")
    encoding = backend.encode(text, add_special_tokens=False)
    places = zip(encoding.ids, encoding.offsets, strict=True)
    return [token for token, (first, _) in places if start <= first < end]
