"""The beginnings of documents that a comparison reads, and the tokenizer that all its runs share.

    FOLDER/train.jsonl       as many documents of each file as the smallest has, one kind behind
                             the other; a run shuffles them by its seed
    FOLDER/<name>.jsonl      test documents of that name, their ids `name/id`
    FOLDER/tokenizer         trained on train.jsonl, unless the recipes name one
    FOLDER/excerpts.json     all that decides them: others are refused in the same folder

Short beginnings of many documents let a run of minutes see many of each kind, and score many.
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
MOST_UNKNOWN = 0.01  # of the tokens of a file; what stands behind them cannot be told apart


class Asked(NamedTuple):
    """What is cut, and how."""

    files: Sequence[str]  # to train on
    tests: Mapping[str, str]  # files by name
    characters: int  # of each document, from its beginning
    limit: int  # test documents of each name
    tokenizer: str | None  # to load; None: to train
    vocab_size: int

    def as_dict(self) -> dict[str, Any]:
        """Independent of the folders of one machine."""
        sizes = {name: identity(path) for name, path in self.tests.items()}
        tokenizer = self.tokenizer and Path(self.tokenizer).name
        return {
            **self._asdict(),
            "files": [identity(path) for path in self.files],
            "tests": sizes,
            "tokenizer": tokenizer,
        }


def identity(path: str) -> dict[str, Any]:
    return {"name": Path(path).name, "bytes": Path(path).stat().st_size}


def prepare_excerpts(folder: Path, asked: Asked) -> dict[str, Any]:
    """Cut them, or find them as they were cut; what they are, for JSON.

    Raises ValueError if the folder holds others, or if the tokenizer does not know the text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    with FileLock(folder / "excerpts.lock"):  # another command may be at it
        if manifest.is_file():
            found = json.loads(manifest.read_text(encoding="utf-8"))
            refuse_others(folder, found["asked"], json.loads(json.dumps(asked.as_dict())))
            return found
        made = {"asked": asked.as_dict(), "documents": cut(folder, asked)}
        made["unknown"] = make_tokenizer(folder, asked)
        write_json(manifest, made)
    return made


def refuse_others(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            raise ValueError(
                f"{folder} holds excerpts with {key}={before.get(key)}, not {value}: "
                "ask for the same, or choose another folder by --output DIR"
            )


def cut(folder: Path, asked: Asked) -> dict[str, int]:
    """Write all excerpts; how many documents there are of each kind."""
    kinds = {Path(path).name.split(".")[0]: path for path in asked.files}
    if len(kinds) < len(asked.files):
        raise ValueError(f"of data.files {list(asked.files)} two have one name: rename a file")
    training = {name: excerpts(path, name, asked) for name, path in kinds.items()}
    fewest = min(map(len, training.values()))
    chosen = {name: spread(documents, fewest) for name, documents in training.items()}
    write_documents(folder / TRAIN, [each for kind in chosen.values() for each in kind])
    counts = {name: len(documents) for name, documents in chosen.items()}
    for name, path in asked.tests.items():
        documents = spread(excerpts(path, name, asked), asked.limit)
        write_documents(folder / f"{name}.jsonl", documents)
        counts[f"test {name}"] = len(documents)
    return counts


def excerpts(path: str, name: str, asked: Asked) -> list[Document]:
    texts = read_documents(path).documents(Report())
    return [Document(f"{name}/{each.id}", each.text[: asked.characters]) for each in texts]


def spread(documents: list[Document], most: int) -> list[Document]:
    """So many of them, at even distances: files are often sorted."""
    count = min(most, len(documents))
    return [documents[i * len(documents) // count] for i in range(count)]


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    lines = [json.dumps(document._asdict()) + "\n" for document in documents]
    path.write_text("".join(lines), encoding="utf-8")


def make_tokenizer(folder: Path, asked: Asked) -> dict[str, float]:
    """Train it or load it; the part of each file that it does not know."""
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
        if found[name] > MOST_UNKNOWN:
            raise ValueError(
                f"{found[name]:.1%} of the tokens of {name} are unknown to the tokenizer "
                f"{asked.tokenizer}, {MOST_UNKNOWN:.0%} are allowed: leave tokenizer.path null, "
                "and one of bytes is trained"
            )
    return found
