"""Files, and datasets of the Hugging Face Hub, give rows: fields, or what keeps them from us.

Files are told apart by their suffix:

    .jsonl .json (also .gz)    one JSON object per line
    .parquet                   one row per document
    .txt, or a folder of them  one document per file
    .py                        one document per file, in the encoding that it declares

A text that is not valid UTF-8 is left out: characters put in place of what cannot be read would be
learnt like any others. Of a file that is damaged all that stands before the damage is read.
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
# What reading a damaged file raises; a connection that breaks is another matter, and does stop us.
DAMAGE = (EOFError, ValueError, zlib.error, gzip.BadGzipFile)


TABLE_ROWS = 64  # of parquet, that are held at once


class Row(NamedTuple):
    """One record of a part: its fields, or the kind of trouble that keeps it from having any."""

    number: int  # in its part, from 1
    place: str  # in words
    fields: dict[str, Any] | None
    trouble: str = ""


# A part of a source: given how many of its rows to pass over, it reads the others.
Part = Callable[[int], Iterator[Row]]


# Files


class File(NamedTuple):
    """A file, and what it is called in its source."""

    path: Path
    name: str


@dataclass(frozen=True)
class Files:
    """Files of this machine, read one after another."""

    files: tuple[File, ...]
    described: str

    def __str__(self) -> str:
        return self.described

    def parts(self) -> Iterator[Part]:
        """A part is a file."""
        return (partial(reader_of(file.path), *file) for file in self.files)

    def identity(self) -> list[Any]:
        """Where they lie, how large they are, and when they were written."""
        return [[*identity_of_file(file.path), file.name] for file in self.files]


def identity_of_file(path: Path) -> list[Any]:
    state = path.stat()
    return [str(path.resolve()), state.st_size, state.st_mtime_ns]


def find_files(files: str | Path | Sequence[str | Path]) -> tuple[File, ...]:
    """Resolve paths, globs and folders, sorted within each."""
    patterns = [files] if isinstance(files, str | Path) else list(files)
    found = tuple(file for pattern in patterns for file in match_pattern(pattern))
    if not found:
        raise ValueError("files is empty; give at least one path, glob or folder")
    for file in found:
        reader_of(file.path)
    return found


def match_pattern(pattern: str | Path) -> list[File]:
    """Resolve one path, glob or folder of plain text."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        texts = [file for file in path.rglob("*.txt") if file.is_file()]
        if not texts:
            raise ValueError(
                f"the folder {path} holds no .txt files; "
                f"name files of another kind by a glob such as {path / '*.jsonl.gz'}"
            )
        named = [File(file, file.relative_to(path).as_posix()) for file in texts]
        return sorted(named, key=lambda file: file.name)
    paths = [path] if path.is_file() else map(Path, sorted(glob.glob(str(path), recursive=True)))
    found = [File(file, file.name) for file in paths if file.is_file()]
    if not found:
        raise FileNotFoundError(
            f"no file matches {str(pattern)!r} in {Path.cwd()}; give a path, a glob or a folder "
            "that exists (for a dataset on the Hub use name=...)"
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
        except DAMAGE:
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
    """Read a whole file as one document; line ends stay as they are."""
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
    except DAMAGE:  # its schema is read here
        return iter([Row(1, f"{name}, row 1", None, DAMAGED)])
    return table_rows(rows, name, start)


def read_module(path: Path, name: str, start: int) -> Iterator[Row]:
    """Read one module of Python in the encoding that it declares."""
    if start:
        return
    try:
        with tokenize.open(path) as file:
            yield Row(1, name, {"id": name, "text": file.read()})
    except (SyntaxError, UnicodeDecodeError):  # the first is about an encoding that is unknown
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


def reader_of(path: Path) -> Callable[[Path, str, int], Iterator[Row]]:
    """Choose the reader by the file's suffix."""
    for suffix, reader in READERS.items():
        if path.name.endswith(suffix):
            return reader
    raise ValueError(f"{path} has none of the suffixes that can be read: {', '.join(READERS)}")


# The Hub


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hub, or a folder of one, read shard by shard through `datasets`."""

    name: str
    config_name: str | None
    split: str
    streaming: bool
    revision: str | None = None

    def __str__(self) -> str:
        return f"the split {self.split!r} of {self.name}"

    def parts(self) -> Iterator[Part]:
        """A part is a file of the dataset; each is opened alone, so that one may be damaged."""
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
        """Which dataset it is, without its revision; of a folder, the state of its files."""
        folder = Path(self.name)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            "name": str(folder.resolve()) if files else self.name,
            "config_name": self.config_name,
            "split": self.split,
            "files": list(map(identity_of_file, files)),
        }

    def at_its_revision(self) -> "HubDataset":
        """Pin the newest revision; itself where the Hub cannot be asked."""
        if self.revision or Path(self.name).exists():
            return self
        from huggingface_hub import HfApi

        try:
            return replace(self, revision=HfApi().dataset_info(self.name).sha)
        except Exception:  # the client's versions have different ones; what is there may do
            return self


def table_rows(rows: Any, name: str, start: int) -> Iterator[Row]:
    """Read an iterable dataset as tables, of which single rows may be damaged.

    Raises OSError for a connection that breaks; what is read by then stays read.
    """
    number = start
    try:
        for table in rows.skip(start).with_format("arrow").iter(batch_size=TABLE_ROWS):
            for row in range(table.num_rows):
                number += 1
                yield table_row(table, row, number, f"{name}, row {number}")
    except DAMAGE:
        yield Row(number + 1, f"{name}, row {number + 1}", None, DAMAGED)
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise
        # Arrow's word for a page that cannot be unpacked, unlike those of systems and networks.
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
    # Imported here: JSON lines, plain text and the standard library are read without it.
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"reading {name} needs the package datasets: pip install datasets"
        ) from error
    try:
        return datasets.load_dataset(name, config_name, **options)
    except ConnectionError as error:
        raise ConnectionError(
            f"the dataset {name} cannot be read from the Hub ({error}): connect to the network, or "
            "read files of this machine (read_documents(files), or data.source=files in a recipe)"
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise ValueError(
            f"{name} is read by a script of its own, which datasets {datasets.__version__} does "
            "not run; name a copy of it in parquet (of deepmind/pg19: emozilla/pg19)"
        ) from error
