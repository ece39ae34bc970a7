"""A program that reads a dataset of a small Hub, is stopped, goes on, and finds what it prepared.

`python -m tests.hub_data FOLDER` writes what it saw into FOLDER/seen.json. It is a program of its
own because the address of the Hub is read when huggingface_hub is imported.
"""

import gzip
import json
import os
import sys
from pathlib import Path

from .hub import File, Hub, Repository

NAME = "reader/books"
NUM_FILES = 3


class Stop(BaseException):
    """What ends a process."""


def upload(repository, extra=""):
    """Commit files with three documents each; the second line of the first file has no text."""
    files = dict(repository.commits[-1][1])
    for number in range(NUM_FILES):
        texts = [f"{extra}file {number} document {row} " * 9 for row in range(3)]
        lines = [{"url": f"http://x/{number}/{row}", "text": t} for row, t in enumerate(texts)]
        lines[1:1] = [{"url": "none", "text": None}] if number == 0 else []
        content = gzip.compress("\n".join(map(json.dumps, lines)).encode())
        files[f"train-{number}.jsonl.gz"] = File(content, False)
    repository.commit(files)


def main(folder):
    repository = Repository(False)
    upload(repository)
    with Hub() as hub:
        hub.repositories[NAME] = repository
        environment = hub.environment(folder / "home") | {"MELODI_HF_CACHE": str(folder / "cache")}
        os.environ.clear()
        os.environ.update(environment)
        seen = read_often(hub, repository)
    close_the_connection()
    seen["hub is gone"] = prepare()
    (folder / "seen.json").write_text(json.dumps(seen))


def close_the_connection():
    """One that is open would still be answered."""
    from huggingface_hub import close_session

    close_session()


def prepare(**options):
    from melodi_hf.data import prepare_documents, read_documents

    from .text import tiny_tokenizer

    source = read_documents(name=NAME, split="train", **options)
    found = prepare_documents(source, tiny_tokenizer(), progress=False)
    return {"ids": [d.id for d in found], "lengths": [len(d.ids) for d in found], **found.as_dict()}


def read_often(hub, repository):
    from melodi_hf.data import prepared, tokens

    right, number = tokens.batch_encoder, 0

    def stopping(tokenizer):
        def encode(texts):
            nonlocal number
            number += 1
            if number == 5:  # in the second file
                raise Stop
            return right(tokenizer)(texts)

        return encode

    tokens.BATCH_CHARACTERS, prepared.batch_encoder = 1, stopping
    try:
        prepare()
    except Stop:
        prepared.batch_encoder = right
    del hub.requests[:]
    seen = {"gone on": prepare(), "asked by then": [path for path, _ in hub.requests]}
    del hub.requests[:]
    seen |= {"again": prepare(), "asked again": [path for path, _ in hub.requests]}
    seen["not streamed, two"] = prepare(streaming=False, limit=2)
    upload(repository, extra="new ")
    seen["new revision"] = prepare()
    return seen


if __name__ == "__main__":
    main(Path(sys.argv[1]))
