"""Documents become ids: tokenizers are loaded, converted from SentencePiece, or trained.

All of them are fast tokenizers of transformers, so that `save_pretrained` puts them beside a model
and `AutoTokenizer` finds them there. Two special tokens are required of each: eos, which begins
every document that a model reads, and pad, which fills its last segment.

A SentencePiece model merges whatever makes the piece of the lowest id, leftmost first. A BPE of the
`tokenizers` library merges by a list of pairs instead; `all_merges` writes down that list:

    every split of a piece into two known pieces, in the order of the ids of the pieces made
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
BLANK = "\u2581"  # what SentencePiece writes for a space

BATCH_CHARACTERS = 4_000_000  # of text that are encoded in one call; bounds the memory needed
PROGRESS_DELAY = 3  # seconds of work before a bar appears
TRAINING_CHARACTERS = 2**29  # of the documents, that a tokenizer is trained on
NO_TOKENS = "without tokens"

T = TypeVar("T")


class EncodedDocument(NamedTuple):
    """The ids of a document, and the sizes of its text that perplexities are divided by."""

    id: str
    ids: np.ndarray  # whole numbers, one per token, without special tokens
    num_words: int  # pieces between whitespace
    num_bytes: int  # of the text in UTF-8


def load_tokenizer(path_or_name: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub and check that it has an eos and a pad token.

    Raises ValueError for one that lacks them and for a SentencePiece model that is not converted.
    """
    path = Path(path_or_name)
    if path.suffix == ".model" or (path.is_dir() and is_only_sentencepiece(path)):
        raise ValueError(
            f"{path} is a SentencePiece model, which transformers loads with ids that differ from "
            "SentencePiece's own; call convert_sentencepiece(file).save_pretrained(folder) once "
            "and load that folder"
        )
    tokenizer = AutoTokenizer.from_pretrained(path_or_name)
    for role in ("eos", "pad"):
        if getattr(tokenizer, f"{role}_token_id") is None:
            raise ValueError(
                f"the tokenizer {str(path_or_name)!r} has no {role} token, but eos and pad are "
                f"both needed; add one by tokenizer.add_special_tokens({{'{role}_token': ...}}) "
                "and save it by tokenizer.save_pretrained(folder)"
            )
    return tokenizer


def is_only_sentencepiece(folder: Path) -> bool:
    """Tell whether a folder holds a SentencePiece model and no tokenizer made from it."""
    return any(folder.glob("*.model")) and not (folder / "tokenizer.json").exists()


# From SentencePiece


class Piece(NamedTuple):
    """One entry of a SentencePiece vocabulary."""

    text: str
    kind: int  # NORMAL, UNKNOWN or another of SentencePiece's numbers


class SentencePieceModel(NamedTuple):
    """What a SentencePiece file says about how text becomes ids."""

    pieces: list[Piece]  # by id
    is_bpe: bool
    byte_fallback: bool
    blank_at_end: bool  # blanks belong to the word before, not to the word after
    character_map: bytes  # compiled rules of normalisation; empty for none
    add_dummy_prefix: bool  # a blank before the text
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


NORMAL, UNKNOWN, USER_DEFINED = 1, 2, 4  # kinds of pieces
BPE = 2  # of the model types


def convert_sentencepiece(path: str | Path) -> PreTrainedTokenizerFast:
    """Turn a SentencePiece BPE model without byte fallback into a fast tokenizer with the same ids.

    `</s>` (eos) and `<pad>` are appended where the model has none, at V and V + 1 for one without
    either. Special tokens are no part of SentencePiece's encoding and are not added to texts.

    One thing may differ: the normalisation of letters that carry combining marks one by one, where
    the marks stand in an unusual order or on a ligature; `tokenizers` drops such a mark, while
    SentencePiece makes it an unknown token.

    Raises ValueError for any other kind of model.
    """
    model = read_sentencepiece(Path(path))
    refuse_unsupported(model, path)
    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    unknown = next(piece.text for piece in model.pieces if piece.kind == UNKNOWN)
    # SentencePiece writes neighbours without an entry as a single unknown token.
    bpe = models.BPE(ids, all_merges(model.pieces), unk_token=unknown, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizer_of(model)
    # Where no piece holds a blank behind a letter, no merge crosses the cut before a blank: words
    # are merged alone, which makes the time linear in the length of the text.
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


def refuse_unsupported(model: SentencePieceModel, path: str | Path) -> None:
    """Raise ValueError for models whose ids a BPE of `tokenizers` would not reproduce."""
    kinds = {piece.kind for piece in model.pieces}
    problems = {
        "is not of the type BPE": not model.is_bpe,
        "falls back to bytes": model.byte_fallback,
        "has user-defined symbols": USER_DEFINED in kinds,
        "writes blanks behind words": model.blank_at_end or not model.escape_whitespaces,
        "has no unknown token": UNKNOWN not in kinds,
    }
    found = [problem for problem, is_there in problems.items() if is_there]
    if found:
        raise ValueError(
            f"the SentencePiece model {path} {' and '.join(found)}; only BPE models without byte "
            "fallback or user-defined symbols can be converted, so train such a one or use "
            "train_tokenizer"
        )


def all_merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """List the pairs that make a piece, in the order in which SentencePiece would merge them."""
    ids = {piece.text: number for number, piece in enumerate(pieces) if piece.kind == NORMAL}
    merges = []
    for text in ids:
        cuts = [(text[:middle], text[middle:]) for middle in range(1, len(text))]
        known = [(left, right) for left, right in cuts if left in ids and right in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def normalizer_of(model: SentencePieceModel) -> normalizers.Normalizer:
    """Build what happens to a text before its words are merged."""
    steps: list[normalizers.Normalizer] = []
    if model.character_map:
        # Precompiled looks up \r\n as one character and drops its second half; apart, both are
        # looked up as SentencePiece does it.
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
    """Read a SentencePiece file by its published protobuf schema.

    The few numbers needed are read here, so that neither sentencepiece nor protobuf, whose
    versions often refuse each other, must be installed.
    """
    try:
        fields = protobuf_fields(path.read_bytes())
        parts = dict(fields)  # of a field that is there twice the last one counts
        trainer = dict(protobuf_fields(parts.get(2, b"")))
        rules = dict(protobuf_fields(parts.get(3, b"")))
        pieces = [dict(protobuf_fields(value)) for number, value in fields if number == 1]
        entries = [Piece(piece[1].decode(), piece.get(3, NORMAL)) for piece in pieces]
    except (AttributeError, IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a SentencePiece model or is damaged; give the .model file that "
            "SentencePiece wrote"
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
    """Split a protobuf message into (field number, value); a value is a number or bytes."""
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
    """Read a whole number of seven bits per byte, lowest first; return it and where it ends."""
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
    """Train a byte-level BPE, which gives every text back unchanged.

    documents: as of `encode_documents`.
    vocab_size: the most entries it may have, the two special tokens (`</s>` = 0, also bos, and
        `<pad>` = 1) and the 256 bytes among them; a small corpus gives fewer.

    The same documents in the same order give the same tokenizer; they are read one by one, and not
    beyond their first `TRAINING_CHARACTERS`, which hold every word that matters. Raises
    ValueError for a vocabulary too small for the bytes and for no documents.
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
    texts = first_texts(as_documents(documents, report))
    first = next(texts, None)
    if first is None:
        found = f" ({report})" if report else ""
        raise ValueError(f"a tokenizer cannot be trained on no documents{found}; give at least one")
    tokenizer.train_from_iterator(prepend(first, texts), trainer)
    report.warn()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def first_texts(documents: Iterable[Document]) -> Iterator[str]:
    """Read texts until there are `TRAINING_CHARACTERS` or more."""
    num_characters = 0
    for document in documents:
        yield document.text
        num_characters += len(document.text)
        if num_characters >= TRAINING_CHARACTERS:
            return


def prepend(first: str, others: Iterator[str]) -> Iterator[str]:
    """Put one text before others."""
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
    """Encode whole documents, several at once; no special tokens are added.

    Text that looks like a special token, such as "</s>" in a page about tokenizers, is encoded as
    the characters it is made of. A bar with tokens per second appears when it takes long. For more
    than fits into memory, or to do it only once, there is `prepare_documents`.

    documents: `Document`s, texts, or rows of fields such as those of a `datasets.Dataset`.
    report: counts documents that are left out, since they are empty, no string, no UTF-8 or give no
        ids; without one they are warned of.
    text_field: the field of a row that holds the text.

    Raises ValueError for no documents, and for what is none.
    """
    encode = batch_encoder(tokenizer)
    noted = Report() if report is None else report
    encoded: list[EncodedDocument] = []
    waiting = as_documents(documents, noted, text_field)
    with encoding_bar(progress) as bar:
        while batch := take_batch(waiting, len_of=lambda document: len(document.text)):
            for document, ids in zip(batch, encode([text for _, text in batch]), strict=True):
                if ids:
                    encoded.append(encoded_document(document, ids))
                else:
                    noted.count(NO_TOKENS, f"document {document.id!r}")
                bar.update(len(ids))
    if not encoded:
        found = f" ({noted})" if noted else ""
        raise ValueError(f"there are no documents to encode{found}; give at least one")
    if report is None:
        noted.warn()
    return encoded


def encoded_document(document: Document, ids: list[int]) -> EncodedDocument:
    """Keep the ids of one document in an array of four bytes each."""
    return EncodedDocument(
        id=document.id,
        ids=np.array(ids, dtype=np.int32),
        num_words=len(document.text.split()),
        num_bytes=len(document.text.encode("utf-8")),
    )


def encoding_bar(progress: bool, done: int = 0) -> tqdm:
    """A bar of tokens, which appears when it takes long; `done` were encoded before."""
    delay = 0 if done else PROGRESS_DELAY
    options = {"unit": "token", "unit_scale": True, "delay": delay, "initial": done}
    return tqdm(desc="encoding", disable=not progress, **options)


def take_batch(
    waiting: Iterator[T], len_of: Callable[[T], int], most: int | None = None
) -> list[T]:
    """Take texts until they have `BATCH_CHARACTERS` or more, and `most` of them at the most."""
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
    """Return a function from texts to ids, free of padding, truncation and length warnings."""
    backend = plain_backend(tokenizer)
    if backend is None:

        def encode_slowly(texts):
            options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            return iter(tokenizer(texts, **options)["input_ids"])

        return encode_slowly

    def encode(texts):
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        # One at a time: as a list of Python's numbers, ids take nine times their size.
        return (encoding.ids for encoding in encodings)

    return encode


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer of `tokenizers` that does the work; None for one that is written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    # A copy, because these switches belong to the tokenizer that the user keeps.
    backend = copy.deepcopy(backend)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend
