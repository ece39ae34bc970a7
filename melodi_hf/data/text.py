"""Long documents from files, from the Hugging Face Hub, or from Python's own standard library.

Every source becomes rows (a dictionary and the place it comes from, for error messages), and every
row becomes a `Document` in one place. Files are told apart by their suffix:

    .jsonl .json (also .gz)    one JSON object per line
    .parquet                   one row per document
    .txt, or a folder of them  one document per file
"""

import glob
import gzip
import hashlib
import json
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

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


class Row(NamedTuple):
    """One record of a source and where it stands, in words for an error message."""

    fields: dict[str, Any]
    place: str


def read_documents(
    files: str | Path | Sequence[str | Path] | None = None,
    *,
    name: str | None = None,
    config_name: str | None = None,
    split: str | None = None,
    text_field: str = "text",
    streaming: bool = True,
    limit: int | None = None,
) -> Iterator[Document]:
    """Read documents either from `files` or from the Hub dataset `name`, one at a time.

    files: paths, globs or folders of .txt; several are read in the order given.
    name, config_name: of a dataset on the Hub, such as "allenai/c4" and "en".
    split: of the Hub dataset; with files, only rows whose field `split` says so.
    text_field: the field that holds the text. The id is the first of `ID_FIELDS` a row has, or its
        running number.
    streaming: read a Hub dataset while it is downloaded instead of afterwards.
    limit: stop after so many documents.

    Raises FileNotFoundError for a path or glob that matches nothing, ValueError for what cannot be
    read as documents; wrong arguments are refused before the first document is asked for.
    """
    if (files is None) == (name is None):
        raise ValueError(
            f"read_documents needs either files or name, got files={files!r} and name={name!r}; "
            "standard_library_documents() needs neither"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, or None for all documents, got {limit}")
    if files is not None:
        rows = file_rows(find_files(files), split)
        source = f"{files}" if split is None else f"{files} with the split {split!r}"
    else:
        rows = hub_rows(str(name), config_name, split, streaming)
        source = f"the split {split!r} of {name}"
    return islice(documents_of(rows, text_field, source), limit)


def documents_of(rows: Iterable[Row], text_field: str, source: str) -> Iterator[Document]:
    """Turn rows into documents; a source without a single one is refused."""
    number = -1
    for number, row in enumerate(rows):
        yield document_of(row, number, text_field)
    if number < 0:
        raise ValueError(f"{source} holds no documents; name a source with at least one")


def document_of(row: Row, number: int, text_field: str) -> Document:
    """Make a document of one row; `number` is its id where the row has none."""
    fields, place = row
    if text_field not in fields:
        raise ValueError(
            f"{place} has no field {text_field!r}, only {sorted(fields)}; "
            "name the one that holds the text as text_field"
        )
    names = (fields[field] for field in ID_FIELDS if fields.get(field) is not None)
    document_id = str(next(names, number))
    text = fields[text_field]
    if not isinstance(text, str):
        raise ValueError(
            f"document {document_id!r} ({place}): {text_field!r} must be a string, "
            f"got {type(text).__name__}"
        )
    if not text.strip():
        raise ValueError(
            f"document {document_id!r} ({place}) is empty; "
            "every document needs at least one word, so leave this one out of the source"
        )
    return Document(document_id, text)


# Files


def find_files(files: str | Path | Sequence[str | Path]) -> list[tuple[Path, str]]:
    """Resolve paths, globs and folders to (file, id for a plain text), sorted within each."""
    patterns = [files] if isinstance(files, str | Path) else list(files)
    found = [pair for pattern in patterns for pair in match_pattern(pattern)]
    if not found:
        raise ValueError("files is empty; give at least one path, glob or folder")
    for path, _ in found:
        reader_of(path)
    return found


def match_pattern(pattern: str | Path) -> list[tuple[Path, str]]:
    """Resolve one path, glob or folder of plain text."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        texts = [file for file in path.rglob("*.txt") if file.is_file()]
        if not texts:
            raise ValueError(
                f"the folder {path} holds no .txt files; "
                f"name files of another kind by a glob such as {path / '*.jsonl.gz'}"
            )
        named = [(file, file.relative_to(path).as_posix()) for file in texts]
        return sorted(named, key=lambda pair: pair[1])
    paths = [path] if path.is_file() else map(Path, sorted(glob.glob(str(path), recursive=True)))
    pairs = [(file, file.name) for file in paths if file.is_file()]
    if not pairs:
        raise FileNotFoundError(
            f"no file matches {str(pattern)!r} in {Path.cwd()}; give a path, a glob or a folder "
            "that exists (for a dataset on the Hub use name=...)"
        )
    return pairs


def file_rows(files: Iterable[tuple[Path, str]], split: str | None) -> Iterator[Row]:
    """Read files one after another; with `split`, only the rows whose field `split` equals it."""
    for path, name in files:
        for row in reader_of(path)(path, name):
            if split is None or row.fields.get("split") == split:
                yield row


def read_json_lines(path: Path, name: str) -> Iterator[Row]:
    """Read one JSON object per line, from plain or gzipped UTF-8; blank lines are skipped."""
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield Row(parse_json_object(line, place), place)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path} is damaged after line {number} ({error}); copy or download it again"
            ) from error


def parse_json_object(line: bytes, place: str) -> dict[str, Any]:
    """Parse one line that must hold a JSON object."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{place} is not JSON ({error}); "
            "each line must be one JSON object on its own, in UTF-8, with the text in a field"
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(
            f'{place} holds a {type(fields).__name__}; each line must be an object like {{"text": '
            '"..."}'
        )
    return fields


def read_plain_text(path: Path, name: str) -> Iterator[Row]:
    """Read a whole file as one document; line ends stay as they are."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); convert it first") from error
    yield Row({"id": name, "text": text}, str(path))


def read_parquet(path: Path, name: str) -> Iterator[Row]:
    """Read the rows of a parquet file without loading all of it."""
    rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    for number, fields in enumerate(rows):
        yield Row(fields, f"{path}, row {number}")


READERS = {
    ".jsonl": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".json": read_json_lines,
    ".json.gz": read_json_lines,
    ".parquet": read_parquet,
    ".txt": read_plain_text,
}


def reader_of(path: Path):
    """Choose the reader by the file's suffix."""
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader
    raise ValueError(f"{path} has none of the suffixes that can be read: {', '.join(READERS)}")


# The Hub


def hub_rows(
    name: str, config_name: str | None, split: str | None, streaming: bool
) -> Iterator[Row]:
    """Open a dataset of the Hub and return its rows."""
    if split is None:
        raise ValueError(
            f"the dataset {name} needs a split, such as split='train' or split='validation'"
        )
    rows = load_dataset(name, config_name, split=split, streaming=streaming)
    return (Row(fields, f"{name}, row {number}") for number, fields in enumerate(rows))


def load_dataset(name: str, config_name: str | None = None, **options):
    """Call `datasets.load_dataset`, with errors that name the remedy."""
    # Imported here: JSON lines, plain text and the standard library are read without it.
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"reading {name} needs the package datasets: pip install datasets"
        ) from error
    try:
        return datasets.load_dataset(name, config_name, **options)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise ValueError(
            f"{name} is read by a script of its own, which datasets {datasets.__version__} does "
            "not run; name a copy of it in parquet (of deepmind/pg19: emozilla/pg19)"
        ) from error


# The standard library


def standard_library_documents(split: str = "train") -> Iterator[Document]:
    """Read the longer modules of this Python's standard library, in the order of their paths.

    split: "train" or "test". The test modules, about `TEST_PERCENT` in a hundred, are chosen by a
        hash of their path, so they are the same on every machine and in every Python that has them.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in module_paths(root) if split_of_module(path) == split]
    if not modules:
        raise ValueError(
            f"{root} holds no modules of {MIN_MODULE_BYTES} bytes or more; this Python carries its "
            "standard library in another form, so read files of your own by read_documents(files)"
        )
    return (read_module(root, path) for path in modules)


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


def read_module(root: Path, path: str) -> Document:
    """Read one module in the encoding that it declares."""
    with tokenize.open(root / path) as file:
        return Document(path, file.read())
