"""Documents as ids on disk: encoded once, then opened at once and read without loading them.

A source is read one time from its beginning to its end, through `datasets` streaming where it lies
on the Hub. What is kept of it lies in a folder that is named by all that decides the ids: the files
with their sizes and times, or the dataset with its revision; the limits; the tokenizer.

    ids             of all documents, one behind the other, two bytes each (four if need be)
    journal.jsonl   a line per batch: its documents, how far the source is read, the report so far
    manifest.json   written last: a folder without it is not whole

Whoever is stopped goes on behind the last whole line of the journal. Several processes that want
the same documents wait for the first of them.

Training draws documents in random order; with all of them at hand that order is exact, over the
whole of the source, and a run that goes on needs no more than an index to find its place
(`segments`). A corpus that no disk holds is cut by `limit`.
"""

import atexit
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np
import tokenizers
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from melodi_hf.data.report import Report
from melodi_hf.data.rows import HubDataset
from melodi_hf.data.text import (
    START,
    Found,
    Names,
    Position,
    Source,
    digest_of,
    shorter_than,
)
from melodi_hf.data.tokens import (
    NO_TOKENS,
    EncodedDocument,
    batch_encoder,
    encoding_bar,
    plain_backend,
    take_batch,
)

FORMAT = 1  # to be raised when the same source would give other files
FOLDER = "MELODI_HF_CACHE"  # the variable that names where prepared documents lie
IDS, JOURNAL, MANIFEST = "ids", "journal.jsonl", "manifest.json"


class Entry(NamedTuple):
    """What the journal says of one document."""

    id: str
    num_tokens: int
    num_words: int
    num_bytes: int
    digest: str  # of its text


class Prepared(Sequence[EncodedDocument]):
    """Documents whose ids lie on disk and come into memory where they are read.

    report: what the source held that is not among them.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        """Open a whole folder."""
        self.manifest = manifest
        self.report = Report(manifest["report"])
        self.entries = [entry for batch in read_journal(folder) for entry in batch.entries]
        ends = np.cumsum([entry.num_tokens for entry in self.entries])
        self.spans = list(zip((0, *ends.tolist()), ends.tolist(), strict=False))
        # A plain view: slices of a memmap carry more than they need.
        self.ids = np.asarray(np.memmap(folder / IDS, dtype=manifest["type"], mode="r"))

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> EncodedDocument: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedDocument]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        entry, (start, end) = self.entries[index], self.spans[index]
        return EncodedDocument(entry.id, self.ids[start:end], entry.num_words, entry.num_bytes)

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def as_dict(self) -> dict[str, Any]:
        """How many there are, a name of their ids (`fingerprint`), and what was left out."""
        names = ("documents", "tokens", "fingerprint", "revision")
        return {**{name: self.manifest[name] for name in names}, "report": self.report.as_dict()}


def prepare_documents(
    source: Source, tokenizer: PreTrainedTokenizerBase, progress: bool = True
) -> Prepared:
    """Open the encoded documents of a source; the first time, encode and write them.

    The folder is `cache_folder()`. If that cannot be written to and was not named by anyone, or if
    the tokenizer is written in Python, whose changes could not be noticed, documents are prepared
    in a temporary folder, for this process alone.

    Raises ValueError for a source without documents and for what is no source, and OSError for a
    folder that cannot be written to or a disk that is full; the next call continues from what
    was written.
    """
    if not isinstance(source, Source):
        raise ValueError(
            f"source is of type {type(source).__name__}: give what read_documents returns, or "
            "encode texts that are in memory by encode_documents"
        )
    if isinstance(source.origin, HubDataset):
        source = replace(source, origin=source.origin.at_its_revision())
    key = key_of(source, tokenizer)
    cache = cache_folder() if key else None
    folder = find_folder(cache, key, source) if cache and key else temporary_folder()
    manifest = read_manifest(folder)
    if manifest is None:
        with explained(folder), only_one(folder, progress):
            # Another may have done it in the meantime.
            manifest = read_manifest(folder) or write(folder, source, tokenizer, progress)
    return Prepared(folder, manifest)


# Where


def cache_folder() -> Path | None:
    """The folder of prepared documents: $MELODI_HF_CACHE, or melodi_hf in Hugging Face's folder.

    None, and a word on the standard error, if the latter cannot be written to. Raises OSError if
    the former cannot.
    """
    named = os.environ.get(FOLDER)
    folder = Path(named).expanduser() if named else Path(HF_HOME) / "melodi_hf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        trouble = f"{folder}, where documents are prepared, cannot be written to ({error.strerror})"
        if named:
            raise OSError(f"{trouble}: name another folder by {FOLDER}") from error
        say(f"{trouble}: they are prepared anew each time until {FOLDER} names another folder")
        return None
    return folder


def temporary_folder() -> Path:
    """A folder that is removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="melodi_hf_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder, "documents")


def key_of(source: Source, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Name all that decides the ids, but for a dataset's revision; None if that cannot be told."""
    backend = plain_backend(tokenizer)
    if backend is None:
        return None
    parts = [FORMAT, tokenizers.__version__, backend.to_str(), source.identity()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def find_folder(cache: Path, key: str, source: Source) -> Path:
    """The folder of these documents; the newest of any revision if the Hub cannot be asked."""
    revision = revision_of(source)
    if not isinstance(source.origin, HubDataset) or revision:
        return cache / "-".join((key, *filter(None, [revision])))
    whole = [path.parent for path in cache.glob(f"{key}-*/{MANIFEST}")]
    return max(whole, key=lambda path: path.stat().st_mtime, default=cache / key)


def revision_of(source: Source) -> str | None:
    return source.origin.revision if isinstance(source.origin, HubDataset) else None


@contextmanager
def only_one(folder: Path, progress: bool) -> Iterator[None]:
    """Let one process in at a time; the system lets the next in if it is killed."""
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            say("another process prepares these documents: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Say what to do when the disk takes no more."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise OSError(
            error.errno,
            f"{folder.parent}, where documents are prepared, takes no more ({error.strerror}); "
            f"free some space and start again, which goes on with what is written, or name a "
            f"folder on another disk by {FOLDER}",
        ) from error


def say(words: str) -> None:
    tqdm.write(words, file=sys.stderr)


# Reading


class Batch(NamedTuple):
    """A line of the journal."""

    entries: list[Entry]
    position: Position  # behind the last document
    report: dict[str, Any]  # of all that stands before
    end: int  # of the line, in bytes


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What is known of a whole folder; None if it is not whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        size = (folder / IDS).stat().st_size
    except FileNotFoundError:
        return None
    # A folder that lost a part, say in a copy, is gone on with like one that was stopped.
    return manifest if size == manifest["tokens"] * np.dtype(manifest["type"]).itemsize else None


def read_journal(folder: Path) -> Iterator[Batch]:
    """Read the whole lines of a journal; the last one may have been cut."""
    path = folder / JOURNAL
    with path.open("rb") if path.exists() else open(os.devnull, "rb") as lines:
        end = 0
        for line in lines:
            end += len(line)
            if not line.endswith(b"\n"):
                return
            found = json.loads(line)
            entries = [Entry(*entry) for entry in found["documents"]]
            yield Batch(entries, Position(*found["position"]), found["report"], end)


# Writing


class Unfinished:
    """A folder that is being written, from its beginning or from where another stopped."""

    def __init__(self, folder: Path, dtype: np.dtype):
        folder.mkdir(exist_ok=True)
        self.dtype, self.num_tokens, self.num_documents = dtype, 0, 0
        self.position, self.report, self.names = START, Report(), Names()
        self.ids, self.journal = (folder / IDS).open("ab"), (folder / JOURNAL).open("ab")
        there, journal_end = self.ids.tell() // dtype.itemsize, 0
        for batch in read_journal(folder):
            if self.num_tokens + sum(entry.num_tokens for entry in batch.entries) > there:
                break
            self.take(batch.entries)
            self.position, self.report = batch.position, Report(batch.report)
            journal_end = batch.end
        self.ids.truncate(self.num_tokens * dtype.itemsize)
        self.journal.truncate(journal_end)

    def take(self, entries: list[Entry]) -> None:
        """Count what lies on the disk."""
        for entry in entries:
            self.names.digests[entry.id] = entry.digest
            self.num_tokens += entry.num_tokens
        self.num_documents += len(entries)

    def write(self, batch: list[tuple[Entry, np.ndarray]], position: Position) -> None:
        """Add documents; ids reach the disk before the journal speaks of them."""
        entries = [entry for entry, _ in batch]
        for _, ids in batch:
            self.ids.write(ids.tobytes())
        flush(self.ids)
        line = {"documents": entries, "position": position, "report": self.report.as_dict()}
        self.journal.write(json.dumps(line).encode() + b"\n")
        flush(self.journal)
        self.take(entries)

    def close(self) -> None:
        self.ids.close()
        self.journal.close()


def flush(file: BinaryIO) -> None:
    """Come back when the disk has it."""
    file.flush()
    os.fsync(file.fileno())


def write(
    folder: Path, source: Source, tokenizer: PreTrainedTokenizerBase, progress: bool
) -> dict[str, Any]:
    """Read and encode what is left of a source; return the manifest."""
    # Two bytes hold the ids of most vocabularies, half of what NumPy would take.
    unfinished = Unfinished(folder, np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4"))
    try:
        write_batches(unfinished, source, tokenizer, progress)
    finally:
        unfinished.close()
    if not unfinished.num_documents:
        raise source.no_documents(unfinished.report)
    manifest = {
        "source": str(source),
        "revision": revision_of(source),
        "documents": unfinished.num_documents,
        "tokens": unfinished.num_tokens,
        "type": unfinished.dtype.str,
        "fingerprint": fingerprint(folder),
        "report": unfinished.report.as_dict(),
    }
    draft = folder / f"{MANIFEST}.unfinished"
    draft.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    draft.replace(folder / MANIFEST)
    return manifest


def fingerprint(folder: Path) -> str:
    """A name that is the same wherever documents of the same names give the same ids."""
    found = hashlib.blake2b(digest_size=16)
    for batch in read_journal(folder):
        for entry in batch.entries:
            found.update(json.dumps([entry.id, entry.num_tokens]).encode())
    with (folder / IDS).open("rb") as ids:
        for part in iter(lambda: ids.read(2**20), b""):
            found.update(part)
    return found.hexdigest()


def write_batches(
    unfinished: Unfinished, source: Source, tokenizer: PreTrainedTokenizerBase, progress: bool
) -> None:
    """Encode batch after batch until the source ends or its limit is reached."""
    encode = batch_encoder(tokenizer)
    found = source.read(unfinished.report, unfinished.position)
    before, start = unfinished.num_documents, time.monotonic()
    with encoding_bar(progress, unfinished.num_tokens) as bar:
        while source.limit is None or unfinished.num_documents < source.limit:
            # No more documents than are wanted, so that none behind the last one is reported.
            left = source.limit and source.limit - unfinished.num_documents
            batch = take_batch(found, lambda each: len(each.document.text), left)
            if not batch:
                break
            texts = [each.document.text for each in batch]
            ids = (np.array(row, dtype=unfinished.dtype) for row in encode(texts))
            kept = list(keep(zip(batch, ids, strict=True), source.min_tokens, unfinished))
            unfinished.write(kept, batch[-1].position)
            number = unfinished.num_documents
            rate = (number - before) / (time.monotonic() - start)
            bar.set_postfix_str(f"{number:,} documents, {rate:.1f} documents/s", refresh=False)
            bar.update(sum(entry.num_tokens for entry, _ in kept))


def keep(
    encoded: Iterator[tuple[Found, np.ndarray]], min_tokens: int, unfinished: Unfinished
) -> Iterator[tuple[Entry, np.ndarray]]:
    """Let through the documents that are long enough and new; report the others."""
    report, names = unfinished.report, unfinished.names
    for (document, place, _), ids in encoded:
        if not len(ids):
            report.count(NO_TOKENS, place)
            continue
        if len(ids) < min_tokens:
            report.count(shorter_than(min_tokens), place)
            continue
        digest = digest_of(document.text)
        name = names.name(document.id, digest, report, place)
        if name is not None:
            num_words, num_bytes = len(document.text.split()), len(document.text.encode())
            yield Entry(name, len(ids), num_words, num_bytes, digest), ids
