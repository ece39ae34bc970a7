"""Cache encoded documents on disk and read them through a memory map.

A source is read once, from beginning to end; datasets of the Hub are streamed. The cache folder is
named by a hash of everything that determines the ids: the files with their sizes and times, or the
dataset with its revision; the limits; the tokenizer.

    ids             of all documents, concatenated; two bytes each (four for large vocabularies)
    journal.jsonl   a line per batch: its documents, the position in the source, the report so far
    manifest.json   written last: a folder without it is incomplete

An interrupted process resumes after the last complete line of the journal. Processes that need the
same documents wait for the first of them.

Random access makes shuffling exact over the whole source, and a resumed run needs only an index
(`segments`). Use `limit` for a corpus that does not fit on the disk.
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
    LocatedDocument,
    Position,
    Source,
    UniqueIds,
    shorter_than,
    text_digest,
)
from melodi_hf.data.tokens import (
    NO_TOKENS,
    EncodedDocument,
    batch_encoder,
    encoding_progress_bar,
    get_fast_backend,
    take_batch,
)

FORMAT = 1  # increase when the same source would give other files
CACHE_VARIABLE = "MELODI_HF_CACHE"  # environment variable with the cache folder
IDS_FILE, JOURNAL_FILE, MANIFEST_FILE = "ids", "journal.jsonl", "manifest.json"


class Entry(NamedTuple):
    """The record of one document in the journal."""

    id: str
    num_tokens: int
    num_words: int
    num_bytes: int
    digest: str  # of its text


class Prepared(Sequence[EncodedDocument]):
    """A sequence of encoded documents on disk, loaded when they are accessed.

    Attributes:
        report: the records of the source that were skipped.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        """Open a complete folder."""
        self.manifest = manifest
        self.report = Report(manifest["report"])
        self.entries = [entry for batch in read_journal(folder) for entry in batch.entries]
        ends = np.cumsum([entry.num_tokens for entry in self.entries])
        self.spans = list(zip((0, *ends.tolist()), ends.tolist(), strict=False))
        # A plain array: slices of a memmap have more overhead.
        self.ids = np.asarray(np.memmap(folder / IDS_FILE, dtype=manifest["type"], mode="r"))

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
        """Return counts, the hash of the ids (`fingerprint`) and the report, for JSON."""
        names = ("documents", "tokens", "fingerprint", "revision")
        return {**{name: self.manifest[name] for name in names}, "report": self.report.as_dict()}


def prepare_documents(
    source: Source, tokenizer: PreTrainedTokenizerBase, progress: bool = True
) -> Prepared:
    """Open the encoded documents of a source; encode and write them the first time.

    The folder is `cache_folder()`. A temporary folder is used instead if the default folder is not
    writable, or if the tokenizer is written in Python, since its changes cannot be detected.

    Raises:
        ValueError: for an argument that is not a source, and for a source without documents.
        OSError: if the folder is not writable or the disk is full. The next call resumes.
    """
    if not isinstance(source, Source):
        raise ValueError(
            f"source is of type {type(source).__name__}: pass the result of read_documents, or "
            "use encode_documents for texts in memory"
        )
    if isinstance(source.origin, HubDataset):
        source = replace(source, origin=source.origin.pin_revision())
    key = cache_key(source, tokenizer)
    cache = cache_folder() if key else None
    folder = find_cached_folder(cache, key, source) if cache and key else temporary_folder()
    manifest = read_manifest(folder)
    if manifest is None:
        with explain_full_disk(folder), exclusive_lock(folder, progress):
            # Another process may have written it in the meantime.
            manifest = read_manifest(folder) or write_prepared(folder, source, tokenizer, progress)
    return Prepared(folder, manifest)


# Cache folder


def cache_folder() -> Path | None:
    """Return $MELODI_HF_CACHE, or melodi_hf in Hugging Face's cache folder.

    If the default folder is not writable, prints a message to standard error and returns None.

    Raises:
        OSError: if $MELODI_HF_CACHE is not writable.
    """
    named = os.environ.get(CACHE_VARIABLE)
    folder = Path(named).expanduser() if named else Path(HF_HOME) / "melodi_hf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = f"the cache folder {folder} cannot be written to ({error.strerror})"
        if named:
            raise OSError(f"{problem}: set {CACHE_VARIABLE} to another folder") from error
        print_message(
            f"{problem}: documents are encoded again each time; set {CACHE_VARIABLE} to avoid this"
        )
        return None
    return folder


def temporary_folder() -> Path:
    """Create a folder that is removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="melodi_hf_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder, "documents")


def cache_key(source: Source, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash everything that determines the ids except the revision; None if that is unknown."""
    backend = get_fast_backend(tokenizer)
    if backend is None:
        return None
    parts = [FORMAT, tokenizers.__version__, backend.to_str(), source.identity()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def find_cached_folder(cache: Path, key: str, source: Source) -> Path:
    """Return the folder of these documents; offline, the newest of any revision."""
    revision = get_revision(source)
    if not isinstance(source.origin, HubDataset) or revision:
        return cache / "-".join((key, *filter(None, [revision])))
    whole = [path.parent for path in cache.glob(f"{key}-*/{MANIFEST_FILE}")]
    return max(whole, key=lambda path: path.stat().st_mtime, default=cache / key)


def get_revision(source: Source) -> str | None:
    return source.origin.revision if isinstance(source.origin, HubDataset) else None


@contextmanager
def exclusive_lock(folder: Path, progress: bool) -> Iterator[None]:
    """Hold a file lock; the system releases it if the process is killed."""
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            print_message("waiting for another process that prepares these documents")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Add a remedy to the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise OSError(
            error.errno,
            f"cannot write to the cache folder {folder.parent} ({error.strerror}): free some space "
            f"and start again to resume, or set {CACHE_VARIABLE} to a folder on another disk",
        ) from error


def print_message(words: str) -> None:
    tqdm.write(words, file=sys.stderr)


# Reading


class JournalEntry(NamedTuple):
    """A line of the journal."""

    entries: list[Entry]
    position: Position  # after the last document
    report: dict[str, Any]  # of all lines up to this one
    end: int  # end of the line, in bytes


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a folder; None if the folder is incomplete."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        size = (folder / IDS_FILE).stat().st_size
    except FileNotFoundError:
        return None
    # A folder with a truncated file is resumed like an interrupted one.
    return manifest if size == manifest["tokens"] * np.dtype(manifest["type"]).itemsize else None


def read_journal(folder: Path) -> Iterator[JournalEntry]:
    """Read the complete lines of a journal; the last line may be truncated."""
    path = folder / JOURNAL_FILE
    with path.open("rb") if path.exists() else open(os.devnull, "rb") as lines:
        end = 0
        for line in lines:
            end += len(line)
            if not line.endswith(b"\n"):
                return
            found = json.loads(line)
            entries = [Entry(*entry) for entry in found["documents"]]
            yield JournalEntry(entries, Position(*found["position"]), found["report"], end)


# Writing


class PreparedWriter:
    """Writes a folder from the beginning, or resumes an interrupted one."""

    def __init__(self, folder: Path, dtype: np.dtype):
        folder.mkdir(exist_ok=True)
        self.dtype, self.num_tokens, self.num_documents = dtype, 0, 0
        self.position, self.report, self.names = START, Report(), UniqueIds()
        self.ids, self.journal = (folder / IDS_FILE).open("ab"), (folder / JOURNAL_FILE).open("ab")
        there, journal_end = self.ids.tell() // dtype.itemsize, 0
        for batch in read_journal(folder):
            if self.num_tokens + sum(entry.num_tokens for entry in batch.entries) > there:
                break
            self.add_entries(batch.entries)
            self.position, self.report = batch.position, Report(batch.report)
            journal_end = batch.end
        self.ids.truncate(self.num_tokens * dtype.itemsize)
        self.journal.truncate(journal_end)

    def add_entries(self, entries: list[Entry]) -> None:
        """Count documents that are on the disk."""
        for entry in entries:
            self.names.digests[entry.id] = entry.digest
            self.num_tokens += entry.num_tokens
        self.num_documents += len(entries)

    def write(self, batch: list[tuple[Entry, np.ndarray]], position: Position) -> None:
        """Append documents; ids are flushed before the journal records them."""
        entries = [entry for entry, _ in batch]
        for _, ids in batch:
            self.ids.write(ids.tobytes())
        flush_to_disk(self.ids)
        line = {"documents": entries, "position": position, "report": self.report.as_dict()}
        self.journal.write(json.dumps(line).encode() + b"\n")
        flush_to_disk(self.journal)
        self.add_entries(entries)

    def close(self) -> None:
        self.ids.close()
        self.journal.close()


def flush_to_disk(file: BinaryIO) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_prepared(
    folder: Path, source: Source, tokenizer: PreTrainedTokenizerBase, progress: bool
) -> dict[str, Any]:
    """Encode the rest of a source and write the manifest, which is returned."""
    # Two bytes are enough for most vocabularies.
    unfinished = PreparedWriter(folder, np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4"))
    try:
        write_batches(unfinished, source, tokenizer, progress)
    finally:
        unfinished.close()
    if not unfinished.num_documents:
        raise source.no_documents_error(unfinished.report)
    manifest = {
        "source": str(source),
        "revision": get_revision(source),
        "documents": unfinished.num_documents,
        "tokens": unfinished.num_tokens,
        "type": unfinished.dtype.str,
        "fingerprint": fingerprint(folder),
        "report": unfinished.report.as_dict(),
    }
    draft = folder / f"{MANIFEST_FILE}.unfinished"
    draft.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    draft.replace(folder / MANIFEST_FILE)
    return manifest


def fingerprint(folder: Path) -> str:
    """Hash the names and ids of all documents."""
    found = hashlib.blake2b(digest_size=16)
    for batch in read_journal(folder):
        for entry in batch.entries:
            found.update(json.dumps([entry.id, entry.num_tokens]).encode())
    with (folder / IDS_FILE).open("rb") as ids:
        for part in iter(lambda: ids.read(2**20), b""):
            found.update(part)
    return found.hexdigest()


def write_batches(
    unfinished: PreparedWriter, source: Source, tokenizer: PreTrainedTokenizerBase, progress: bool
) -> None:
    """Encode batches until the source ends or its limit is reached."""
    encode = batch_encoder(tokenizer)
    found = source.read(unfinished.report, unfinished.position)
    before, start = unfinished.num_documents, time.monotonic()
    with encoding_progress_bar(progress, unfinished.num_tokens) as bar:
        while source.limit is None or unfinished.num_documents < source.limit:
            # Read no more documents than needed, so that none after the last is reported.
            left = source.limit and source.limit - unfinished.num_documents
            batch = take_batch(found, lambda each: len(each.document.text), left)
            if not batch:
                break
            texts = [each.document.text for each in batch]
            ids = (np.array(row, dtype=unfinished.dtype) for row in encode(texts))
            accepted = list(
                filter_documents(zip(batch, ids, strict=True), source.min_tokens, unfinished)
            )
            unfinished.write(accepted, batch[-1].position)
            number = unfinished.num_documents
            rate = (number - before) / (time.monotonic() - start)
            bar.set_postfix_str(f"{number:,} documents, {rate:.1f} documents/s", refresh=False)
            bar.update(sum(entry.num_tokens for entry, _ in accepted))


def filter_documents(
    encoded: Iterator[tuple[LocatedDocument, np.ndarray]],
    min_tokens: int,
    unfinished: PreparedWriter,
) -> Iterator[tuple[Entry, np.ndarray]]:
    """Yield documents that are long enough and new; report the others."""
    report, names = unfinished.report, unfinished.names
    for (document, place, _), ids in encoded:
        if not len(ids):
            report.count(NO_TOKENS, place)
            continue
        if len(ids) < min_tokens:
            report.count(shorter_than(min_tokens), place)
            continue
        digest = text_digest(document.text)
        name = names.assign(document.id, digest, report, place)
        if name is not None:
            num_words, num_bytes = len(document.text.split()), len(document.text.encode())
            yield Entry(name, len(ids), num_words, num_bytes, digest), ids
