"""Read files and datasets of the Hugging Face Hub as rows of fields.

The suffix determines the format:

    .jsonl .json (also .gz)    one JSON object per line
    .parquet                   one row per document
    .txt, or a folder of them  one document per file
    .py                        one document per file, in the encoding that it declares

Texts that are not valid UTF-8 are skipped, since a model would learn replacement characters. A
damaged file is read up to the damage.
"""

import glob
import gzip
import json
import tokenize
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

NOT_UTF8 = "not UTF-8"
NOT_JSON = "not JSON"
NOT_AN_OBJECT = "not a JSON object"
DAMAGED = "damaged there or before"
# Errors of damaged files; connection errors are not caught.
DAMAGE_ERRORS = (EOFError, ValueError, zlib.error, gzip.BadGzipFile)


TABLE_ROWS = 64  # rows of parquet in memory at once


class Row(NamedTuple):
    """A record of a part: its fields, or the problem with it."""

    number: int  # within the part, from 1
    place: str  # for messages
    fields: dict[str, Any] | None
    problem: str = ""


# A part of a source: maps the number of rows to skip to an iterator over the others.
Part = Callable[[int], Iterator[Row]]


# Files


class File(NamedTuple):
    """A file and its name in the source."""

    path: Path
    name: str


@dataclass(frozen=True)
class Files:
    """Local files, read one after another."""

    files: tuple[File, ...]
    described: str

    def __str__(self) -> str:
        return self.described

    def parts(self) -> Iterator[Part]:
        """Yield one part per file."""
        return (partial(choose_reader(file.path), *file) for file in self.files)

    def identity(self) -> list[Any]:
        """Return paths, sizes and modification times."""
        return [[*file_identity(file.path), file.name] for file in self.files]


def file_identity(path: Path) -> list[Any]:
    state = path.stat()
    return [str(path.resolve()), state.st_size, state.st_mtime_ns]


def find_files(files: str | Path | Sequence[str | Path]) -> tuple[File, ...]:
    """Resolve paths, globs and folders, sorted within each."""
    patterns = [files] if isinstance(files, str | Path) else list(files)
    found = tuple(file for pattern in patterns for file in match_pattern(pattern))
    if not found:
        raise ValueError("files is empty: pass at least one path, glob or folder")
    for file in found:
        choose_reader(file.path)
    return found


def match_pattern(pattern: str | Path) -> list[File]:
    """Resolve one path, glob or folder of plain text."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        texts = [file for file in path.rglob("*.txt") if file.is_file()]
        if not texts:
            raise ValueError(
                f"the folder {path} has no .txt files: "
                f"pass a glob for other formats, such as {path / '*.jsonl.gz'}"
            )
        named = [File(file, file.relative_to(path).as_posix()) for file in texts]
        return sorted(named, key=lambda file: file.name)
    paths = [path] if path.is_file() else map(Path, sorted(glob.glob(str(path), recursive=True)))
    found = [File(file, file.name) for file in paths if file.is_file()]
    if not found:
        raise FileNotFoundError(
            f"no file matches {str(pattern)!r} in {Path.cwd()}: pass an existing path, glob or "
            "folder (for a dataset of the Hub use name=...)"
        )
    return found


def read_json_lines(path: Path, name: str, start: int) -> Iterator[Row]:
    """Read one JSON object per line, from plain or gzipped UTF-8; blank lines are skipped."""
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if number > start and line.strip():
                    yield json_row(line, number, f"{name}, line {number}")
        except DAMAGE_ERRORS:
            yield Row(number + 1, f"{name}, line {number + 1}", None, DAMAGED)


def json_row(line: bytes, number: int, place: str) -> Row:
    """Parse one line that should hold a JSON object."""
    try:
        fields = json.loads(line)
    except UnicodeDecodeError:
        return Row(number, place, None, NOT_UTF8)
    except (ValueError, RecursionError):
        return Row(number, place, None, NOT_JSON)
    if not isinstance(fields, dict):
        return Row(number, place, None, NOT_AN_OBJECT)
    return Row(number, place, fields)


def read_plain_text(path: Path, name: str, start: int) -> Iterator[Row]:
    """Read a whole file as one document; line ends are not changed."""
    if start:
        return
    try:
        yield Row(1, name, {"id": name, "text": path.read_bytes().decode("utf-8")})
    except UnicodeDecodeError:
        yield Row(1, name, None, NOT_UTF8)


def read_parquet(path: Path, name: str, start: int) -> Iterator[Row]:
    """Read the rows of a parquet file without loading all of it."""
    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except DAMAGE_ERRORS:  # its schema is read here
        return iter([Row(1, f"{name}, row 1", None, DAMAGED)])
    return table_rows(rows, name, start)


def read_module(path: Path, name: str, start: int) -> Iterator[Row]:
    """Read one module of Python in the encoding that it declares."""
    if start:
        return
    try:
        with tokenize.open(path) as file:
            yield Row(1, name, {"id": name, "text": file.read()})
    except (SyntaxError, UnicodeDecodeError):  # SyntaxError: the encoding is unknown
        yield Row(1, name, None, NOT_UTF8)


READERS = {
    ".jsonl": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".json": read_json_lines,
    ".json.gz": read_json_lines,
    ".parquet": read_parquet,
    ".txt": read_plain_text,
    ".py": read_module,
}


def choose_reader(path: Path) -> Callable[[Path, str, int], Iterator[Row]]:
    """Choose the reader by the file's suffix."""
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader
    raise ValueError(f"{path} has an unknown suffix: supported are {', '.join(READERS)}")


# The Hub


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hub, or a local copy of one, read shard by shard with `datasets`."""

    name: str
    config_name: str | None
    split: str
    streaming: bool
    revision: str | None = None

    def __str__(self) -> str:
        return f"the split {self.split!r} of {self.name}"

    def parts(self) -> Iterator[Part]:
        """Yield one part per file, so that a damaged file does not affect the others."""
        options = {"revision": self.revision} if self.revision else {}
        rows = load_dataset(
            self.name, self.config_name, split=self.split, streaming=self.streaming, **options
        )
        rows = rows if self.streaming else rows.to_iterable_dataset()
        for index in range(rows.num_shards):
            shard = rows.shard(num_shards=rows.num_shards, index=index)
            name = self.name if rows.num_shards == 1 else f"{self.name}, file {index}"
            yield partial(table_rows, shard, name)

    def identity(self) -> dict[str, Any]:
        """Return name and options without the revision; of a folder, the state of its files."""
        folder = Path(self.name)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            "name": str(folder.resolve()) if files else self.name,
            "config_name": self.config_name,
            "split": self.split,
            "files": list(map(file_identity, files)),
        }

    def pin_revision(self) -> "HubDataset":
        """Pin the newest revision; returns self if the Hub is unreachable."""
        if self.revision or Path(self.name).exists():
            return self
        from huggingface_hub import HfApi

        try:
            return replace(self, revision=HfApi().dataset_info(self.name).sha)
        except (
            Exception
        ):  # versions of the client raise different errors; the local cache may be enough
            return self


def table_rows(rows: Any, name: str, start: int) -> Iterator[Row]:
    """Read an iterable dataset as tables, skipping damaged rows.

    Raises:
        OSError: if the connection breaks.
    """
    number = start
    try:
        for table in rows.skip(start).with_format("arrow").iter(batch_size=TABLE_ROWS):
            for row in range(table.num_rows):
                number += 1
                yield table_row(table, row, number, f"{name}, row {number}")
    except DAMAGE_ERRORS:
        yield Row(number + 1, f"{name}, row {number + 1}", None, DAMAGED)
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise
        # Arrow's error for a damaged page, unlike errors of the system or network.
        yield Row(number + 1, f"{name}, row {number + 1}", None, DAMAGED)


def table_row(table: Any, row: int, number: int, place: str) -> Row:
    """Take one row out of a table."""
    try:
        fields = {column: table[column][row].as_py() for column in table.column_names}
    except UnicodeDecodeError:
        return Row(number, place, None, NOT_UTF8)
    return Row(number, place, fields)


def load_dataset(name: str, config_name: str | None = None, **options):
    """Call `datasets.load_dataset`, with errors that name the remedy."""
    # Imported here, since JSON lines, plain text and the standard library do not need it.
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"reading {name} needs the package datasets: run pip install datasets"
        ) from error
    try:
        return datasets.load_dataset(name, config_name, **options)
    except ConnectionError as error:
        raise ConnectionError(
            f"the dataset {name} cannot be read from the Hub ({error}): connect to the network, or "
            "read local files (read_documents(files), or data.source=files in a recipe)"
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise ValueError(
            f"{name} needs a loading script, which datasets {datasets.__version__} does not "
            "support: use a copy in parquet (for deepmind/pg19: emozilla/pg19)"
        ) from error
