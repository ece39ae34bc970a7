"""Load, convert (from SentencePiece) or train tokenizers, and encode documents.

All of them are fast tokenizers of transformers, with `save_pretrained` and `AutoTokenizer`. Each
needs two special tokens: eos, which begins every document, and pad, which fills the last segment.

SentencePiece merges the pair that makes the piece with the lowest id, leftmost first. The BPE of
the `tokenizers` library merges by a list of pairs; `all_merges` makes that list:

    every split of a piece into two known pieces, ordered by the id of the piece
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from melodi_hf.data.report import Report
from melodi_hf.data.text import Document, as_documents

END = "</s>"
PAD = "<pad>"
BLANK = "\u2581"  # SentencePiece's symbol for a space

BATCH_CHARACTERS = 4_000_000  # encoded per call; bounds memory
PROGRESS_DELAY = 3  # seconds before a progress bar appears
TRAINING_CHARACTERS = 2**29  # used to train a tokenizer
NO_TOKENS = "without tokens"

T = TypeVar("T")


class EncodedDocument(NamedTuple):
    """The ids of a document, and the size of its text in words and bytes."""

    id: str
    ids: np.ndarray  # integers, one per token, without special tokens
    num_words: int  # separated by whitespace
    num_bytes: int  # of the text in UTF-8


def load_tokenizer(path_or_name: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub and check that it has an eos and a pad token.

    Raises ValueError if a token is missing, and for an unconverted SentencePiece model.
    """
    path = Path(path_or_name)
    if path.suffix == ".model" or (path.is_dir() and is_only_sentencepiece(path)):
        raise ValueError(
            f"{path} is a SentencePiece model, which transformers loads with other ids than "
            "SentencePiece; call convert_sentencepiece(file).save_pretrained(folder) once and load "
            "that folder"
        )
    tokenizer = AutoTokenizer.from_pretrained(path_or_name)
    for role in ("eos", "pad"):
        if getattr(tokenizer, f"{role}_token_id") is None:
            raise ValueError(
                f"the tokenizer {str(path_or_name)!r} has no {role} token, but eos and pad are "
                f"required: add one by tokenizer.add_special_tokens({{'{role}_token': ...}}) "
                "and save it by tokenizer.save_pretrained(folder)"
            )
    return tokenizer


def is_only_sentencepiece(folder: Path) -> bool:
    """Tell whether a folder has a SentencePiece model that is not converted."""
    return any(folder.glob("*.model")) and not (folder / "tokenizer.json").exists()


# From SentencePiece


class Piece(NamedTuple):
    """One entry of a SentencePiece vocabulary."""

    text: str
    kind: int  # NORMAL, UNKNOWN or another type of SentencePiece


class SentencePieceModel(NamedTuple):
    """The parts of a SentencePiece file that determine the encoding."""

    pieces: list[Piece]  # by id
    is_bpe: bool
    byte_fallback: bool
    blank_at_end: bool  # spaces belong to the preceding word
    character_map: bytes  # compiled normalisation rules; may be empty
    add_dummy_prefix: bool  # add a space before the text
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


NORMAL, UNKNOWN, USER_DEFINED = 1, 2, 4  # kinds of pieces
BPE = 2  # of the model types


def convert_sentencepiece(path: str | Path) -> PreTrainedTokenizerFast:
    """Convert a SentencePiece BPE model to a fast tokenizer with equal ids (no byte fallback).

    `</s>` (eos) and `<pad>` are appended if the model has none, with the ids V and V + 1. Special
    tokens are not added to texts.

    A known difference: combining marks in an unusual order or on a ligature. `tokenizers` drops
    such a mark, SentencePiece encodes it as an unknown token.

    Raises ValueError for other models.
    """
    model = read_sentencepiece(Path(path))
    check_supported(model, path)
    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    unknown = next(piece.text for piece in model.pieces if piece.kind == UNKNOWN)
    # SentencePiece encodes adjacent unknown characters as one unknown token.
    bpe = models.BPE(ids, all_merges(model.pieces), unk_token=unknown, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = build_normalizer(model)
    # If no piece has a space after a letter, no merge crosses a word boundary. Splitting into words
    # makes the time linear in the length of the text.
    if not any(BLANK in piece.text.lstrip(BLANK) for piece in model.pieces):
        words = Regex(f"{BLANK}+[^{BLANK}]*")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    spaces = [decoders.Replace(BLANK, " "), decoders.Fuse()]
    prefix = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(spaces + prefix)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def check_supported(model: SentencePieceModel, path: str | Path) -> None:
    """Raise ValueError for models that the BPE of `tokenizers` cannot reproduce."""
    kinds = {piece.kind for piece in model.pieces}
    problems = {
        "is not of the type BPE": not model.is_bpe,
        "has byte fallback": model.byte_fallback,
        "has user-defined symbols": USER_DEFINED in kinds,
        "has spaces after words": model.blank_at_end or not model.escape_whitespaces,
        "has no unknown token": UNKNOWN not in kinds,
    }
    found = [problem for problem, is_there in problems.items() if is_there]
    if found:
        raise ValueError(
            f"the SentencePiece model {path} {' and '.join(found)}; only BPE models without byte "
            "fallback and user-defined symbols can be converted: train such a model or use "
            "train_tokenizer"
        )


def all_merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """List the merges in the order in which SentencePiece applies them."""
    ids = {piece.text: number for number, piece in enumerate(pieces) if piece.kind == NORMAL}
    merges = []
    for text in ids:
        cuts = [(text[:middle], text[middle:]) for middle in range(1, len(text))]
        known = [(left, right) for left, right in cuts if left in ids and right in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def build_normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    """Build the normaliser of a model."""
    steps: list[normalizers.Normalizer] = []
    if model.character_map:
        # Precompiled treats \r\n as one character and drops the \n; replace it by two characters,
        # as SentencePiece does.
        rules = normalizers.Precompiled(model.character_map)
        steps += [normalizers.Replace("\r\n", rules.normalize_str("\r") + "\n"), rules]
    if model.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex("^ +| +$"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if model.add_dummy_prefix:
        steps += [normalizers.Prepend(BLANK)]
    return normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a SentencePiece file by its protobuf schema, without sentencepiece or protobuf."""
    try:
        fields = protobuf_fields(path.read_bytes())
        parts = dict(fields)  # the last of repeated fields counts
        trainer = dict(protobuf_fields(parts.get(2, b"")))
        rules = dict(protobuf_fields(parts.get(3, b"")))
        pieces = [dict(protobuf_fields(value)) for number, value in fields if number == 1]
        entries = [Piece(piece[1].decode(), piece.get(3, NORMAL)) for piece in pieces]
    except (AttributeError, IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a SentencePiece model or is damaged: pass a .model file"
        ) from error
    return SentencePieceModel(
        pieces=entries,
        is_bpe=trainer.get(3) == BPE,
        byte_fallback=bool(trainer.get(35, 0)),
        blank_at_end=bool(trainer.get(24, 0)),
        character_map=rules.get(2, b""),
        add_dummy_prefix=bool(rules.get(3, 1)),
        remove_extra_whitespaces=bool(rules.get(4, 1)),
        escape_whitespaces=bool(rules.get(5, 1)),
    )


def protobuf_fields(data: bytes) -> list[tuple[int, Any]]:
    """Split a protobuf message into (field number, value); values are numbers or bytes."""
    fields: list[tuple[int, Any]] = []
    position = 0
    while position < len(data):
        tag, position = read_varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = read_varint(data, position)
            fields.append((number, value))
            continue
        if wire_type == 2:
            size, position = read_varint(data, position)
        else:
            size = {1: 8, 5: 4}[wire_type]
        if position + size > len(data):
            raise IndexError("the message ends within a field")
        fields.append((number, data[position : position + size]))
        position += size
    return fields


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Read a varint; return the number and the position after it."""
    value = shift = 0
    while data[position] & 0x80:
        value |= (data[position] & 0x7F) << shift
        shift += 7
        position += 1
    return value | data[position] << shift, position + 1


# Training


def train_tokenizer(
    documents: Iterable[Document | str | Mapping[str, Any]], vocab_size: int, progress: bool = True
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode every text.

    documents: as for `encode_documents`.
    vocab_size: the maximum size, including two special tokens (`</s>` = 0, also bos, and
        `<pad>` = 1) and 256 bytes; a small corpus gives fewer entries.

    The same documents in the same order give the same tokenizer. Documents are read one by one, up
    to `TRAINING_CHARACTERS`. Raises ValueError for no documents, and for a vocabulary that is too
    small.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size must be at least {smallest} (256 bytes and 2 special tokens), "
            f"got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(alphabet),
        show_progress=progress,
    )
    report = Report()
    texts = limit_texts(as_documents(documents, report))
    first = next(texts, None)
    if first is None:
        found = f" ({report})" if report else ""
        raise ValueError(
            f"there are no documents to train a tokenizer on{found}; pass at least one"
        )
    tokenizer.train_from_iterator(prepend(first, texts), trainer)
    report.warn()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def limit_texts(documents: Iterable[Document]) -> Iterator[str]:
    """Yield texts up to a total of `TRAINING_CHARACTERS`."""
    num_characters = 0
    for document in documents:
        yield document.text
        num_characters += len(document.text)
        if num_characters >= TRAINING_CHARACTERS:
            return


def prepend(first: str, others: Iterator[str]) -> Iterator[str]:
    """Yield a text, then the others."""
    yield first
    yield from others


# Encoding


def encode_documents(
    documents: Iterable[Document | str | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    progress: bool = True,
    report: Report | None = None,
    text_field: str = "text",
) -> list[EncodedDocument]:
    """Encode whole documents in batches, without special tokens.

    Text that looks like a special token, such as "</s>", is encoded as characters. A progress bar
    appears after a few seconds. For corpora larger than memory, and to encode only once, use
    `prepare_documents`.

    documents: `Document`s, texts, or rows such as those of a `datasets.Dataset`.
    report: counts skipped documents (empty, not a string, not UTF-8, no ids); without a report a
        warning is issued.
    text_field: the field of a row with the text.

    Raises ValueError for no documents, and for items of other types.
    """
    encode = batch_encoder(tokenizer)
    noted = Report() if report is None else report
    encoded: list[EncodedDocument] = []
    waiting = as_documents(documents, noted, text_field)
    with encoding_progress_bar(progress) as bar:
        while batch := take_batch(waiting, len_of=lambda document: len(document.text)):
            for document, ids in zip(batch, encode([text for _, text in batch]), strict=True):
                if ids:
                    encoded.append(make_encoded_document(document, ids))
                else:
                    noted.count(NO_TOKENS, f"document {document.id!r}")
                bar.update(len(ids))
    if not encoded:
        found = f" ({noted})" if noted else ""
        raise ValueError(f"there are no documents to encode{found}; pass at least one")
    if report is None:
        noted.warn()
    return encoded


def make_encoded_document(document: Document, ids: list[int]) -> EncodedDocument:
    """Make an encoded document, with ids as int32."""
    return EncodedDocument(
        id=document.id,
        ids=np.array(ids, dtype=np.int32),
        num_words=len(document.text.split()),
        num_bytes=len(document.text.encode("utf-8")),
    )


def encoding_progress_bar(progress: bool, done: int = 0) -> tqdm:
    """Make a progress bar in tokens that appears after a delay, starting at `done`."""
    delay = 0 if done else PROGRESS_DELAY
    options = {"unit": "token", "unit_scale": True, "delay": delay, "initial": done}
    return tqdm(desc="encoding", disable=not progress, **options)


def take_batch(
    waiting: Iterator[T], len_of: Callable[[T], int], most: int | None = None
) -> list[T]:
    """Take texts up to a total of `BATCH_CHARACTERS`, and at most `most` of them."""
    batch: list[T] = []
    num_characters = 0
    for text in waiting:
        batch.append(text)
        num_characters += len_of(text)
        if num_characters >= BATCH_CHARACTERS or len(batch) == most:
            break
    return batch


def batch_encoder(
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[list[str]], Iterator[list[int]]]:
    """Return a function that encodes texts without padding, truncation or warnings."""
    backend = get_fast_backend(tokenizer)
    if backend is None:

        def encode_slowly(texts):
            options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            return iter(tokenizer(texts, **options)["input_ids"])

        return encode_slowly

    def encode(texts):
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        # A generator, since Python lists need nine times the memory of an array.
        return (encoding.ids for encoding in encodings)

    return encode


def get_fast_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """Return a copy of the tokenizer's Rust backend; None for a tokenizer in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # A copy, so that the user's tokenizer is not changed.
    backend = copy.deepcopy(backend)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend
