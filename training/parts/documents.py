"""Prepare the documents of a run, describe them, and check them when the run resumes."""

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


def train_own_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Train a tokenizer on the training documents; `prepare` reports what was skipped."""
    texts = recipe.documents("train").documents(Report())
    return train_tokenizer(texts, recipe.tokenizer.vocab_size)


def prepare(recipe: Recipe, tokenizer: Any) -> tuple[Prepared, Prepared | None, Prepared]:
    """Prepare the documents for training, validation (if any) and test."""
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
    """Describe the number of documents and what was skipped."""
    text = f"{len(documents):,} documents ({documents.num_tokens:,} tokens) to {purpose} on"
    return f"{text}; {documents.report}" if documents.report else text


def check_documents(output: Path, documents: Prepared, is_resumed: bool) -> None:
    """Check that a resumed run has the documents that it was started with."""
    path, now = output / DOCUMENTS, documents.as_dict()
    there = is_resumed and path.is_file()
    before = json.loads(path.read_text(encoding="utf-8")) if there else now
    if before["fingerprint"] != now["fingerprint"]:
        raise ValueError(
            f"{output} was started with {before['documents']:,} documents ({before['tokens']:,} "
            f"tokens), which differ from the current ones ({now['documents']:,}, {now['tokens']:,} "
            "tokens): restore them, or start a new run by --output DIR"
        )
    if is_first_process():
        write_json(path, now)
