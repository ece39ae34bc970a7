"""Read documents from files, from the Hugging Face Hub, or from Python's standard library.

A source consists of parts (files, or shards of a dataset) with rows (`rows`). A row is converted to
a `Document`, or counted in the `Report` if it is invalid. Reading can be resumed at any position.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from melodi_hf.data.report import RENAMED, REPEATED, Report
from melodi_hf.data.rows import NOT_UTF8, File, Files, HubDataset, Row, find_files

EMPTY = "empty"
NOT_A_STRING = "with a text that is no string"
ID_FIELDS = (
    "id",
    "short_book_title",
    "url",
)  # of our files, PG-19, C4; the first that a row has is used

# Excluded from the standard library: installed packages, tests, tables and generated files.
EXCLUDED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
GENERATED_PREFIX = "_sysconfigdata"
MIN_MODULE_BYTES = 8192  # shorter modules hardly use a memory
TEST_PERCENT = 10


class Document(NamedTuple):
    """A text with an id."""

    id: str
    text: str


class Position(NamedTuple):
    """A position in a source, to resume reading."""

    part: int = 0  # index of the current part
    row: int = 0  # rows read of this part
    total: int = 0  # rows read of all parts


class LocatedDocument(NamedTuple):
    """A document, its place, and the position after it."""

    document: Document
    place: str
    position: Position


START = Position()


@dataclass(frozen=True)
class Source:
    """A re-iterable source of documents.

    Iteration warns about skipped records; `documents` counts them in a report instead.
    """

    origin: "Files | HubDataset"
    text_field: str = "text"
    split: str | None = None  # only rows of files with this value in the field `split`
    limit: int | None = None  # documents
    min_tokens: int = 0  # shorter documents are skipped; in text, those with fewer bytes

    def __iter__(self) -> Iterator[Document]:
        report = Report()
        yield from self.documents(report)
        report.warn()

    def __str__(self) -> str:
        return str(self.origin) + (f" with the split {self.split!r}" if self.split else "")

    def documents(self, report: Report) -> Iterator[Document]:
        """Read all documents, with unique ids.

        Raises ValueError if there is none.
        """
        names, number = UniqueIds(), 0
        for document, place, _ in self.read(report):
            name = names.assign(document.id, text_digest(document.text), report, place)
            if name is not None:
                number += 1
                yield Document(name, document.text)
            if number == self.limit:
                return
        if not number:
            raise self.no_documents_error(report)

    def read(self, report: Report, start: Position = START) -> Iterator[LocatedDocument]:
        """Read the documents after `start`, without limit; ids may repeat."""
        part, row_number, total = start
        for part, read in enumerate(self.origin.parts()):
            if part < start.part:
                continue
            for row in read(row_number if part == start.part else 0):
                if row.fields and self.split not in (None, row.fields.get("split")):
                    continue
                total += 1
                document = row_to_document(row, total - 1, self.text_field, report)
                if document is None:
                    continue
                if len(document.text.encode()) < self.min_tokens:
                    report.count(shorter_than(self.min_tokens), row.place)
                    continue
                yield LocatedDocument(document, row.place, Position(part, row.number, total))

    def no_documents_error(self, report: Report) -> ValueError:
        """Make the error for a source without valid documents."""
        remedy = "pass a source with at least one"
        if missing_field(self.text_field) in report.counts:
            remedy += ", or the name of the text field as text_field"
        found = f" ({report})" if report else ""
        return ValueError(f"{self} has no documents{found}; {remedy}")

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the documents, for JSON."""
        return {
            "origin": self.origin.identity(),
            "text_field": self.text_field,
            "split": self.split,
            "limit": self.limit,
            "min_tokens": self.min_tokens,
        }


def read_documents(
    files: str | Path | Sequence[str | Path] | None = None,
    *,
    name: str | None = None,
    config_name: str | None = None,
    split: str | None = None,
    text_field: str = "text",
    streaming: bool = True,
    limit: int | None = None,
    min_tokens: int = 0,
) -> Source:
    """Read documents lazily, from `files` or from the Hub dataset `name`.

    files: paths, globs or folders of .txt, read in this order.
    name, config_name: a dataset of the Hub, such as "allenai/c4" and "en", or its local folder.
    split: split of the dataset; with files, only rows with this value in the field `split`.
    text_field: the field with the text. The id is the first of `ID_FIELDS` in a row, or its index.
    streaming: stream a Hub dataset instead of downloading it first.
    limit: the maximum number of documents.
    min_tokens: skip shorter documents; those with fewer bytes are skipped before encoding.

    A document with the id and text of an earlier one is skipped; one with the id of another text is
    renamed to "id (2)".

    Raises:
        FileNotFoundError: if a path or glob matches nothing.
        ValueError: for invalid arguments; during reading, if there are no documents.
    """
    if (files is None) == (name is None):
        raise ValueError(
            f"pass either files or name, got files={files!r} and name={name!r}; "
            "standard_library_documents() needs neither"
        )
    check_limits(limit, min_tokens)
    if files is not None:
        named = [files] if isinstance(files, str | Path) else files
        origin = Files(find_files(files), ", ".join(map(str, named)))
        return Source(origin, text_field, split, limit, min_tokens)
    if split is None:
        raise ValueError(
            f"the dataset {name} needs a split: pass split='train' or split='validation'"
        )
    dataset = HubDataset(str(name), config_name, split, streaming)
    return Source(dataset, text_field, None, limit, min_tokens)


def check_limits(limit: int | None, min_tokens: int) -> None:
    """Raise ValueError for limits out of range."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, or None for all documents, got {limit}")
    if min_tokens < 0:
        raise ValueError(f"min_tokens must be 0 or more, got {min_tokens}")


def row_to_document(row: Row, number: int, text_field: str, report: Report) -> Document | None:
    """Convert a row to a document; `number` is the id of a row without one."""
    problem, fields = row.problem, row.fields or {}
    text: Any = fields.get(text_field)
    if not problem and text_field not in fields:
        problem = missing_field(text_field)
    elif not problem:
        problem = invalid_reason(text)
    if problem:
        report.count(problem, row.place)
        return None
    names = (fields[field] for field in ID_FIELDS if fields.get(field) is not None)
    return Document(str(next(names, number)), text)


def as_documents(
    given: Iterable[Document | str | Mapping[str, Any]], report: Report, text_field: str = "text"
) -> Iterator[Document]:
    """Convert documents, texts or rows, such as those of a `datasets.Dataset`, to documents.

    The id of a text without one is its index. Texts that are empty, no strings or not valid UTF-8
    are skipped and counted in the report.

    Raises ValueError for anything else.
    """
    allowed = "pass an iterable of texts, of Documents or of rows, such as a datasets.Dataset"
    # A str would be iterated by characters, a dictionary such as a DatasetDict by keys.
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ValueError(f"documents is of type {type(given).__name__}: {allowed}")
    for index, each in enumerate(given):
        if isinstance(each, Document):
            fields, place = {"id": each.id, text_field: each.text}, f"document {each.id!r}"
        elif isinstance(each, str):
            fields, place = {text_field: each}, f"document {index}"
        elif isinstance(each, Mapping):
            fields, place = dict(each), f"document {index}"
        else:
            raise ValueError(f"document {index} is of type {type(each).__name__}: {allowed}")
        document = row_to_document(Row(index + 1, place, fields), index, text_field, report)
        if document is not None:
            yield document


def invalid_reason(text: Any) -> str:
    """Return why a text is invalid; an empty string if it is valid."""
    if not isinstance(text, str):
        return NOT_A_STRING
    if not text.strip():
        return EMPTY
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can contain halves of surrogate pairs
        return NOT_UTF8
    return ""


def missing_field(text_field: str) -> str:
    return f"without the field {text_field!r}"


def shorter_than(min_tokens: int) -> str:
    return f"shorter than {min_tokens:,} tokens"


def text_digest(text: str) -> str:
    """Hash a text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class UniqueIds:
    """Assigns unique ids to texts."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    def assign(self, wanted: str, digest: str, report: Report, place: str) -> str | None:
        """Return a unique id for a text; None if the same text has it already."""
        name, number = wanted, 1
        while name in self.digests:
            if self.digests[name] == digest:
                report.count(REPEATED, place)
                return None
            number += 1
            name = f"{wanted} ({number})"
        if number > 1:
            report.count(RENAMED, place)
        self.digests[name] = digest
        return name


# The standard library


def standard_library_documents(
    split: str = "train", limit: int | None = None, min_tokens: int = 0
) -> Source:
    """Read the longer modules of Python's standard library, ordered by path.

    split: "train" or "test". About `TEST_PERCENT` percent of the modules are for testing. They are
        chosen by a hash of the path, so they are the same on all machines and Python versions.
    limit, min_tokens: as for `read_documents`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    check_limits(limit, min_tokens)
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in module_paths(root) if module_split(path) == split]
    if not modules:
        raise ValueError(
            f"{root} has no modules of at least {MIN_MODULE_BYTES} bytes: this Python has its "
            "standard library in another form; read your own files by read_documents(files)"
        )
    files = Files(tuple(File(root / path, path) for path in modules), "the standard library")
    return Source(files, limit=limit, min_tokens=min_tokens)


def module_paths(root: Path) -> list[str]:
    """List the modules below `root` as sorted relative paths with slashes."""
    found = []
    for folder, folders, files in os.walk(root):
        # os.walk skips removed folders; site-packages may be larger than the library.
        folders[:] = [name for name in folders if name not in EXCLUDED_FOLDERS]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    long = [path for path in found if path.stat().st_size >= MIN_MODULE_BYTES]
    return sorted(
        path.relative_to(root).as_posix()
        for path in long
        if not path.name.startswith(GENERATED_PREFIX)
    )


def module_split(path: str) -> str:
    """Choose "train" or "test" by a hash that does not depend on the process, unlike `hash()`."""
    number = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")
    return "test" if number % 100 < TEST_PERCENT else "train"
