"""Prepare the excerpts of documents for a comparison, and the tokenizer that its runs share.

    FOLDER/train.jsonl       the same number of documents of each file, file after file; each run
                             shuffles them by its seed
    FOLDER/<name>.jsonl      test documents of that name, with ids `name/id`
    FOLDER/tokenizer         trained on train.jsonl, unless the recipes name one
    FOLDER/excerpts.json     the request; another request for the same folder raises an error

Short excerpts let a short run read and score many documents of each kind.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from record import write_json

from melodi_hf.data.report import Report
from melodi_hf.data.text import Document, read_documents
from melodi_hf.data.tokens import load_tokenizer, train_tokenizer

MANIFEST, TRAIN, TOKENIZER = "excerpts.json", "train.jsonl", "tokenizer"
MAX_UNKNOWN = 0.01  # part of the tokens of a file that may be unknown to the tokenizer


class ExcerptRequest(NamedTuple):
    """What is requested: files, lengths, numbers."""

    files: Sequence[str]  # to train on
    tests: Mapping[str, str]  # files by name
    characters: int  # of each document, from its beginning
    limit: int  # test documents of each name
    tokenizer: str | None  # to load; None: to train
    vocab_size: int

    def as_dict(self) -> dict[str, Any]:
        """Return the request as JSON data, without local folders."""
        sizes = {name: file_identity(path) for name, path in self.tests.items()}
        tokenizer = self.tokenizer and Path(self.tokenizer).name
        return {
            **self._asdict(),
            "files": [file_identity(path) for path in self.files],
            "tests": sizes,
            "tokenizer": tokenizer,
        }


def file_identity(path: str) -> dict[str, Any]:
    return {"name": Path(path).name, "bytes": Path(path).stat().st_size}


def prepare_excerpts(folder: Path, asked: ExcerptRequest) -> dict[str, Any]:
    """Write the excerpts, or reuse existing ones; return their description as JSON data.

    Raises ValueError if the folder has other excerpts, or if the tokenizer does not know the text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    with FileLock(folder / "excerpts.lock"):  # another command may be writing them
        if manifest.is_file():
            found = json.loads(manifest.read_text(encoding="utf-8"))
            check_same_request(folder, found["asked"], json.loads(json.dumps(asked.as_dict())))
            return found
        made = {"asked": asked.as_dict(), "documents": write_excerpts(folder, asked)}
        made["unknown"] = make_tokenizer(folder, asked)
        write_json(manifest, made)
    return made


def check_same_request(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            raise ValueError(
                f"{folder} has excerpts with {key}={before.get(key)}, not {value}: "
                "pass the same options, or choose another folder by --output DIR"
            )


def write_excerpts(folder: Path, asked: ExcerptRequest) -> dict[str, int]:
    """Write all excerpts; return the number of documents of each kind."""
    kinds = {Path(path).name.split(".")[0]: path for path in asked.files}
    if len(kinds) < len(asked.files):
        raise ValueError(f"two of data.files {list(asked.files)} have the same name: rename a file")
    training = {name: read_excerpts(path, name, asked) for name, path in kinds.items()}
    fewest = min(map(len, training.values()))
    chosen = {name: sample_evenly(documents, fewest) for name, documents in training.items()}
    write_documents(folder / TRAIN, [each for kind in chosen.values() for each in kind])
    counts = {name: len(documents) for name, documents in chosen.items()}
    for name, path in asked.tests.items():
        documents = sample_evenly(read_excerpts(path, name, asked), asked.limit)
        write_documents(folder / f"{name}.jsonl", documents)
        counts[f"test {name}"] = len(documents)
    return counts


def read_excerpts(path: str, name: str, asked: ExcerptRequest) -> list[Document]:
    texts = read_documents(path).documents(Report())
    return [Document(f"{name}/{each.id}", each.text[: asked.characters]) for each in texts]


def sample_evenly(documents: list[Document], most: int) -> list[Document]:
    """Select `most` documents at even distances, since files are often sorted."""
    count = min(most, len(documents))
    return [documents[i * len(documents) // count] for i in range(count)]


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    lines = [json.dumps(document._asdict()) + "\n" for document in documents]
    path.write_text("".join(lines), encoding="utf-8")


def make_tokenizer(folder: Path, asked: ExcerptRequest) -> dict[str, float]:
    """Train or load the tokenizer; return the part of unknown tokens in each file."""
    if asked.tokenizer is None:
        training = read_documents(folder / TRAIN).documents(Report())
        trained = train_tokenizer(training, asked.vocab_size, progress=False)
        trained.save_pretrained(folder / TOKENIZER)
    tokenizer = load_tokenizer(asked.tokenizer or folder / TOKENIZER)
    found = {}
    for name in ("train", *asked.tests):
        texts = [each.text for each in read_documents(folder / f"{name}.jsonl").documents(Report())]
        ids = [i for each in tokenizer(texts, add_special_tokens=False).input_ids for i in each]
        found[name] = ids.count(tokenizer.unk_token_id) / len(ids)
        if found[name] > MAX_UNKNOWN:
            raise ValueError(
                f"{found[name]:.1%} of the tokens of {name} are unknown to the tokenizer "
                f"{asked.tokenizer}, at most {MAX_UNKNOWN:.0%} is allowed: set tokenizer.path to "
                "null to train a byte-level one"
            )
    return found
