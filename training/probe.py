"""Measure what a model remembers: accuracy of probes by distance.

    python training/probe.py runs/quickstart --probe passkey repeat --distances 1024 4096 \
        --output probes.json
    python training/probe.py runs/quickstart --files passkey.jsonl.gz --books books.jsonl.gz
    python training/probe.py runs/quickstart --queue --books books.jsonl.gz --output queue.json

Probes are made from the documents of --books, or from the held-out modules of Python's standard
library; recall and copy are made from ids only. --queue prints instead the attention of each head
to MELODI's long-term memory by age (in windows), relative to uniform attention; `queue_attention`
defines the other columns. Plots are written next to the output.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import parts.threads  # noqa: F401  # before torch

# isort: split

import numpy as np
from record import environment, write_json
from transformers import PreTrainedModel

from melodi_hf.data.text import Document, read_documents, standard_library_documents
from melodi_hf.data.tokens import batch_encoder, encode_documents
from melodi_hf.evaluation.command_line import (
    FAILURES,
    non_negative_int,
    one_line,
    output_file,
    positive_int,
    print_device,
    require_packages,
    seed_number,
)
from melodi_hf.evaluation.loading import load_matching_tokenizer, load_model
from melodi_hf.evaluation.probe_files import read_examples
from melodi_hf.evaluation.probe_plots import plot_by_distance, plot_queue
from melodi_hf.evaluation.probes import MAKERS, TEXT_PROBES, Example, Material, make_examples
from melodi_hf.evaluation.probing import evaluate_probe
from melodi_hf.evaluation.queue_attention import queue_attention
from melodi_hf.evaluation.tables import markdown_table, queue_table

DISTANCES = (1024, 4096, 16384)
COLUMNS = ("distance", "examples", "accuracy", "low", "high", "chance", "control_accuracy", "gain")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what a model remembers, by distance.")
    parser.add_argument("model", help="output folder of training/train.py, or a name on the Hub")
    parser.add_argument("--probe", nargs="+", choices=MAKERS, default=list(TEXT_PROBES))
    parser.add_argument("--distances", nargs="+", type=non_negative_int, metavar="TOKENS")
    parser.add_argument(
        "--examples", type=positive_int, default=20, metavar="N", help="examples per distance"
    )
    parser.add_argument(
        "--size", type=positive_int, metavar="N", help="digits, tokens, pairs or symbols"
    )
    parser.add_argument("--files", nargs="+", metavar="FILE", help="read probes from these files")
    parser.add_argument(
        "--books", nargs="+", metavar="FILE", help="documents: JSONL, parquet or text"
    )
    parser.add_argument("--tokenizer", help="default: from the model's folder")
    parser.add_argument(
        "--queue", action="store_true", help="measure attention to the queue instead"
    )
    parser.add_argument(
        "--read-tokens", type=positive_int, default=50_000, metavar="N", help="for --queue"
    )
    parser.add_argument("--output", type=output_file, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--segment-windows", type=positive_int, default=8, help="windows per forward"
    )
    parser.add_argument("--num-rows", type=positive_int, default=8, help="batch size in texts")
    parser.add_argument("--seed", type=seed_number, default=0)
    return parser.parse_args(arguments)


def load_documents(options: argparse.Namespace) -> list[Document]:
    files = options.books
    return list(read_documents(files=files) if files else standard_library_documents("test"))


def encode_by_length(tokenizer, documents: list[Document]) -> np.ndarray:
    """Encode and concatenate the documents, the longest first."""
    encoded = encode_documents(documents, tokenizer)
    return np.concatenate([d.ids for d in sorted(encoded, key=lambda d: -len(d.ids))])


def make_probes(options: argparse.Namespace, model: PreTrainedModel) -> dict[str, list[Example]]:
    """Make the examples of each requested probe."""
    material = Material(model.config.vocab_size)
    documents: list[Document] = []
    if options.books if options.files else set(options.probe) & set(TEXT_PROBES):
        tokenizer = load_matching_tokenizer(model, options.tokenizer or options.model)
        documents = load_documents(options)
        encode, start_id = batch_encoder(tokenizer), tokenizer.eos_token_id
        ids = None if options.files else encode_by_length(tokenizer, documents)
        material = Material(model.config.vocab_size, ids, start_id, encode)
    if options.files:
        books = {document.id: document.text for document in documents}
        chosen = {"distances": options.distances, "limit": options.examples}
        return read_examples(options.files, material, books, **chosen)
    return {
        probe: [
            example
            for distance in options.distances or DISTANCES
            for example in make_examples(
                probe, distance, options.examples, material, size=options.size, seed=options.seed
            )
        ]
        for probe in options.probe
    }


def probe(options: argparse.Namespace, model: PreTrainedModel) -> dict[str, Any]:
    shape = {"segment_windows": options.segment_windows, "num_rows": options.num_rows}
    results = {}
    for name, examples in make_probes(options, model).items():
        rows = results[name] = evaluate_probe(model, examples, name=name, **shape)
        table = markdown_table(COLUMNS, [[row[column] for column in COLUMNS] for row in rows])
        print(f"\n{name}\n\n{table}\n", flush=True)
    if options.output is not None:
        for value in ("accuracy", "gain"):
            path = options.output.with_name(f"{options.output.stem}_{value}")
            marks = {"window": model.config.window_length}
            plot_by_distance(results, path, value=value, marks=marks)
    return {"probes": results}


def queue(options: argparse.Namespace, model: PreTrainedModel) -> dict[str, Any]:
    tokenizer = load_matching_tokenizer(model, options.tokenizer or options.model)
    ids = encode_by_length(tokenizer, load_documents(options))[: options.read_tokens - 1]
    ids = np.concatenate([[tokenizer.eos_token_id], ids])
    measured = queue_attention(model, ids, segment_windows=options.segment_windows)
    print(f"\n{queue_table(measured)}\n")
    if options.output is not None:
        plot_queue(measured, options.output)
    return {"queue": measured}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        if options.output is not None:
            require_packages("train", "matplotlib")
        model = load_model(options.model)
        print_device(model.device, model.dtype)
        measured = (queue if options.queue else probe)(options, model)
        if options.output is not None:
            window = {"window_length": model.config.window_length}
            write_json(
                options.output, {"model": options.model, **window, **measured, **environment()}
            )
    except FAILURES as error:
        sys.exit(f"probe.py: {one_line(error)}")


if __name__ == "__main__":
    main()
