"""The documents of a run: read, prepared, told of, and found to be the same when it goes on."""

import json
from pathlib import Path
from typing import Any

from record import is_first_process, write_json
from transformers import PreTrainedTokenizerBase

from melodi_hf.data.prepared import Prepared, prepare_documents
from melodi_hf.data.report import Report
from melodi_hf.data.tokens import train_tokenizer
from parts.recipe import Recipe

DOCUMENTS = "documents.json"


def own_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Train one on the documents to train on; `prepare` tells what was left out of them."""
    texts = recipe.documents("train").documents(Report())
    return train_tokenizer(texts, recipe.tokenizer.vocab_size)


def prepare(recipe: Recipe, tokenizer: Any) -> tuple[Prepared, Prepared | None, Prepared]:
    """Prepare what is trained on, what is scored during training, if anything, and the test."""
    train = prepare_documents(recipe.documents("train"), tokenizer)
    validation = None
    if recipe.training.evaluate_every:
        validation = prepare_documents(recipe.documents("validation"), tokenizer)
    test = prepare_documents(recipe.documents("test"), tokenizer)
    for documents, purpose in ((train, "train"), (validation, "validate"), (test, "test")):
        if documents is not None and is_first_process():
            print(describe(documents, purpose))
    return train, validation, test


def describe(documents: Prepared, purpose: str) -> str:
    """How many there are, and what was left out."""
    told = f"{len(documents):,} documents ({documents.num_tokens:,} tokens) to {purpose} on"
    return f"{told}; {documents.report}" if documents.report else told


def check_documents(output: Path, documents: Prepared, going_on: bool) -> None:
    """Refuse to go on with other documents than the run began with."""
    path, now = output / DOCUMENTS, documents.as_dict()
    there = going_on and path.is_file()
    before = json.loads(path.read_text(encoding="utf-8")) if there else now
    if before["fingerprint"] != now["fingerprint"]:
        raise ValueError(
            f"{output} was begun with {before['documents']:,} documents "
            f"({before['tokens']:,} tokens) which are not those of now ({now['documents']:,}, "
            f"{now['tokens']:,} tokens): bring them back, or begin anew by --output DIR"
        )
    if is_first_process():
        write_json(path, now)
