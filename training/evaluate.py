"""Compute perplexity on whole documents, with all, part or none of the memory.

    python training/evaluate.py runs/quickstart --data books_test.jsonl.gz --output results.json
    python training/evaluate.py runs/quickstart --settings carried emptied long_off queue_4
    python training/evaluate.py runs/quickstart --settings all

Without --data the documents are the held-out modules of Python's standard library.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import parts.threads  # noqa: F401  # before torch

# isort: split

from parts.documents import describe
from record import environment, write_json

from melodi_hf.data.prepared import prepare_documents
from melodi_hf.data.text import Source, read_documents, standard_library_documents
from melodi_hf.evaluation.command_line import (
    FAILURES,
    one_line,
    output_file,
    positive_int,
    print_device,
)
from melodi_hf.evaluation.loading import load_matching_tokenizer, load_model
from melodi_hf.evaluation.perplexity import (
    READERS,
    check_settings,
    evaluate_perplexity,
    list_settings,
)
from melodi_hf.evaluation.tables import evaluation_table, memory_table, position_table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compute the perplexity of a model on whole documents."
    )
    parser.add_argument("model", help="output folder of training/train.py, or a name on the Hub")
    parser.add_argument(
        "--data", nargs="+", metavar="FILE", help="documents: JSONL, parquet or text"
    )
    parser.add_argument("--tokenizer", help="default: from the model's folder")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--limit-documents", type=positive_int, metavar="N", help="use the first N documents"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        metavar="NAME",
        default=["carried", "emptied"],
        help=f"{', '.join(READERS)}, queue_N (keep N windows), or all",
    )
    parser.add_argument(
        "--segment-windows", type=positive_int, default=8, help="windows per forward"
    )
    parser.add_argument("--num-rows", type=positive_int, default=8, help="batch size in documents")
    return parser.parse_args(arguments)


def source(options: argparse.Namespace) -> Source:
    files, limit = options.data, options.limit_documents
    if files:
        return read_documents(files, limit=limit)
    return standard_library_documents("test", limit=limit)


def evaluate(options: argparse.Namespace) -> None:
    model = load_model(options.model)
    print_device(model.device, model.dtype)
    tokenizer = load_matching_tokenizer(model, options.tokenizer or options.model)
    settings = list_settings(model) if options.settings == ["all"] else options.settings
    check_settings(settings, model)  # before the slow preparation of documents
    documents = prepare_documents(source(options), tokenizer)
    print(describe(documents, "score"), end="\n\n")
    evaluation = evaluate_perplexity(
        model,
        documents,
        start_id=tokenizer.eos_token_id,  # every document begins with eos
        settings=settings,
        segment_windows=options.segment_windows,
        num_rows=options.num_rows,
    )
    parts = [memory_table(evaluation)] if len(settings) > 2 else []
    print(evaluation_table(evaluation), *parts, position_table(evaluation), sep="\n\n")
    if options.output is not None:
        files = [Path(name).name for name in options.data or ()]
        results = {
            "name": Path(options.model).resolve().name,
            "data": {"files": files or ["standard_library"], **documents.as_dict()},
            **environment(),
            "parameters": model.num_parameters(),
            "memory_floats": model.config.memory_floats(),
            "evaluation": evaluation,
        }
        write_json(options.output, results)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        evaluate(options)
    except FAILURES as error:
        sys.exit(f"evaluate.py: {one_line(error)}")


if __name__ == "__main__":
    main()
