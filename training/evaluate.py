"""Perplexity of a model on whole documents, with its memory and without.

    python training/evaluate.py runs/quickstart --data books_test.jsonl.gz --output results.json

Without --data it reads those sources of Python's standard library that are held out of training.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Threads that wait soon give their core away: beside another program, spinning costs tenfold.
os.environ["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "10000")

from documents import describe

from melodi_hf.data.prepared import prepare_documents
from melodi_hf.data.text import Source, read_documents, standard_library_documents
from melodi_hf.evaluation.loading import load_its_tokenizer, load_model
from melodi_hf.evaluation.perplexity import READERS, evaluate_perplexity
from melodi_hf.evaluation.tables import evaluation_table, position_table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Perplexity of a model on whole documents.")
    parser.add_argument("model", help="a folder that training/train.py left, or a name on the Hub")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="documents, as in a recipe")
    parser.add_argument("--tokenizer", help="if it is not in the model's folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the JSON")
    parser.add_argument("--limit-documents", type=int, metavar="N", help="only the first N")
    parser.add_argument("--settings", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--segment-windows", type=int, default=8, help="windows in one forward")
    parser.add_argument("--num-rows", type=int, default=8, help="documents side by side")
    return parser.parse_args(arguments)


def source(options: argparse.Namespace) -> Source:
    files, limit = options.data, options.limit_documents
    if files:
        return read_documents(files, limit=limit)
    return standard_library_documents("test", limit=limit)


def evaluate(options: argparse.Namespace) -> None:
    model = load_model(options.model)
    tokenizer = load_its_tokenizer(model, options.tokenizer or options.model)
    documents = prepare_documents(source(options), tokenizer)
    print(describe(documents, "score"), end="\n\n")
    evaluation = evaluate_perplexity(
        model,
        documents,
        start_id=tokenizer.eos_token_id,  # eos begins every document
        settings=options.settings,
        segment_windows=options.segment_windows,
        num_rows=options.num_rows,
    )
    print(evaluation_table(evaluation), position_table(evaluation), sep="\n\n")
    if options.output is not None:
        results = {**evaluation, "data": documents.as_dict()}
        options.output.write_text(json.dumps(results, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        evaluate(options)
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate.py: {error}")


if __name__ == "__main__":
    main()
