"""Long documents from files, from the Hugging Face Hub, or from Python's own standard library.

A source is a row of parts, files or shards of a dataset, which give rows (`rows`). A row becomes a
`Document` or, if it is none, a line of the `Report`. Reading can begin at any place that reading
stopped at.
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
ID_FIELDS = ("id", "short_book_title", "url")  # ours, PG-19's, C4's; the first that a row has

# Of the standard library: what is installed by others, tests, tables, and what a build generated.
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
MIN_MODULE_BYTES = 8192  # shorter modules say little about a memory
TEST_PERCENT = 10


class Document(NamedTuple):
    """A text that is read from its beginning to its end."""

    id: str
    text: str


class Position(NamedTuple):
    """How far a source is read."""

    part: int = 0  # the part that is being read
    row: int = 0  # rows of it that were read
    total: int = 0  # rows of all parts that were read


class Found(NamedTuple):
    """A document, where it was found, and how far the source is read behind it."""

    document: Document
    place: str
    position: Position


START = Position()


@dataclass(frozen=True)
class Source:
    """Documents that can be read again and again: `for document in source`.

    Whoever iterates is warned of what was left out; `documents` counts it in a report instead.
    """

    origin: "Files | HubDataset"
    text_field: str = "text"
    split: str | None = None  # only rows of files whose field `split` says so
    limit: int | None = None  # documents
    min_tokens: int = 0  # what is shorter is left out; in text, what has fewer bytes

    def __iter__(self) -> Iterator[Document]:
        report = Report()
        yield from self.documents(report)
        report.warn()

    def __str__(self) -> str:
        return str(self.origin) + (f" with the split {self.split!r}" if self.split else "")

    def documents(self, report: Report) -> Iterator[Document]:
        """Read all documents, each under an id of its own.

        Raises ValueError if there is none.
        """
        names, number = Names(), 0
        for document, place, _ in self.read(report):
            name = names.name(document.id, digest_of(document.text), report, place)
            if name is not None:
                number += 1
                yield Document(name, document.text)
            if number == self.limit:
                return
        if not number:
            raise self.no_documents(report)

    def read(self, report: Report, start: Position = START) -> Iterator[Found]:
        """Read what stands behind `start`, without limit; the same id may come twice."""
        part, row_number, total = start
        for part, read in enumerate(self.origin.parts()):
            if part < start.part:
                continue
            for row in read(row_number if part == start.part else 0):
                if row.fields and self.split not in (None, row.fields.get("split")):
                    continue
                total += 1
                document = document_of(row, total - 1, self.text_field, report)
                if document is None:
                    continue
                if len(document.text.encode()) < self.min_tokens:
                    report.count(shorter_than(self.min_tokens), row.place)
                    continue
                yield Found(document, row.place, Position(part, row.number, total))

    def no_documents(self, report: Report) -> ValueError:
        """The error for a source of which nothing is left."""
        remedy = "name a source with at least one"
        if missing_field(self.text_field) in report.counts:
            remedy += ", or the field that holds the text as text_field"
        found = f" ({report})" if report else ""
        return ValueError(f"{self} holds no documents{found}; {remedy}")

    def identity(self) -> dict[str, Any]:
        """All that decides which documents are read, for JSON."""
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
    """Read documents either from `files` or from the Hub dataset `name`, one at a time.

    files: paths, globs or folders of .txt; several are read in the order given.
    name, config_name: of a dataset on the Hub, such as "allenai/c4" and "en"; or a folder of one.
    split: of the Hub dataset; with files, only rows whose field `split` says so.
    text_field: the field that holds the text. The id is the first of `ID_FIELDS` a row has, or its
        running number.
    streaming: read a Hub dataset while it is downloaded instead of afterwards.
    limit: stop after so many documents.
    min_tokens: leave out shorter documents; those of fewer bytes are not even encoded.

    A document with the id and the text of another is left out, one with the id of another text is
    kept as "id (2)". Raises FileNotFoundError for a path or glob that matches nothing and
    ValueError for wrong arguments at once, and ValueError when it is read and holds no documents.
    """
    if (files is None) == (name is None):
        raise ValueError(
            f"read_documents needs either files or name, got files={files!r} and name={name!r}; "
            "standard_library_documents() needs neither"
        )
    check_limits(limit, min_tokens)
    if files is not None:
        named = [files] if isinstance(files, str | Path) else files
        origin = Files(find_files(files), ", ".join(map(str, named)))
        return Source(origin, text_field, split, limit, min_tokens)
    if split is None:
        raise ValueError(
            f"the dataset {name} needs a split, such as split='train' or split='validation'"
        )
    dataset = HubDataset(str(name), config_name, split, streaming)
    return Source(dataset, text_field, None, limit, min_tokens)


def check_limits(limit: int | None, min_tokens: int) -> None:
    """Raise ValueError for limits that no document could keep."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, or None for all documents, got {limit}")
    if min_tokens < 0:
        raise ValueError(f"min_tokens must be 0 or more, got {min_tokens}")


def document_of(row: Row, number: int, text_field: str, report: Report) -> Document | None:
    """Make a document of one row; `number` is its id where the row has none."""
    trouble, fields = row.trouble, row.fields or {}
    text: Any = fields.get(text_field)
    if not trouble and text_field not in fields:
        trouble = missing_field(text_field)
    elif not trouble:
        trouble = trouble_of(text)
    if trouble:
        report.count(trouble, row.place)
        return None
    names = (fields[field] for field in ID_FIELDS if fields.get(field) is not None)
    return Document(str(next(names, number)), text)


def as_documents(
    given: Iterable[Document | str | Mapping[str, Any]], report: Report, text_field: str = "text"
) -> Iterator[Document]:
    """Read documents, texts, and rows of fields, such as those of a `datasets.Dataset`, alike.

    A text without an id is named by its index. Empty texts, and those that are no string or no
    UTF-8, are left out and counted in the report.

    Raises ValueError for anything else.
    """
    allowed = "give an iterable of texts, of Documents or of rows, such as a datasets.Dataset"
    # Iterating over a text gives characters; over a dictionary, such as a DatasetDict, its keys.
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
        document = document_of(Row(index + 1, place, fields), index, text_field, report)
        if document is not None:
            yield document


def trouble_of(text: Any) -> str:
    """Tell what keeps a text from being read; nothing, mostly."""
    if not isinstance(text, str):
        return NOT_A_STRING
    if not text.strip():
        return EMPTY
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can write halves of characters
        return NOT_UTF8
    return ""


def missing_field(text_field: str) -> str:
    return f"without the field {text_field!r}"


def shorter_than(min_tokens: int) -> str:
    return f"shorter than {min_tokens:,} tokens"


def digest_of(text: str) -> str:
    """A short name of a text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Names:
    """The ids that are taken, each by one text."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    def name(self, wanted: str, digest: str, report: Report, place: str) -> str | None:
        """Give a text an id that no other has; None if it is there already."""
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
    """Read the longer modules of this Python's standard library, in the order of their paths.

    split: "train" or "test". The test modules, about `TEST_PERCENT` in a hundred, are chosen by a
        hash of their path, so they are the same on every machine and in every Python that has them.
    limit, min_tokens: as of `read_documents`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    check_limits(limit, min_tokens)
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in module_paths(root) if split_of_module(path) == split]
    if not modules:
        raise ValueError(
            f"{root} holds no modules of {MIN_MODULE_BYTES} bytes or more; this Python carries its "
            "standard library in another form, so read files of your own by read_documents(files)"
        )
    files = Files(tuple(File(root / path, path) for path in modules), "the standard library")
    return Source(files, limit=limit, min_tokens=min_tokens)


def module_paths(root: Path) -> list[str]:
    """List the modules below `root` worth reading, as sorted paths relative to it, with slashes."""
    found = []
    for folder, folders, files in os.walk(root):
        # os.walk enters only what is left: site-packages may hold more files than the library.
        folders[:] = [name for name in folders if name not in EXCLUDED_FOLDERS]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    long = [path for path in found if path.stat().st_size >= MIN_MODULE_BYTES]
    return sorted(
        path.relative_to(root).as_posix()
        for path in long
        if not path.name.startswith(GENERATED_PREFIX)
    )


def split_of_module(path: str) -> str:
    """Say "train" or "test" by a hash that is the same everywhere, unlike `hash()`."""
    number = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")
    return "test" if number % 100 < TEST_PERCENT else "train"
