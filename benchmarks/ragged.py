"""Measure the cost of padding: rows of different lengths against equal rows.

    python benchmarks/ragged.py [--rounds 7] [--output benchmarks/results/ragged.json] [--tiny]

Eight rows with the same total number of tokens. Times are CPU seconds; each round measures equal
and ragged rows, and the median of the ratios is reported. "prefill" fills a cache and computes the
last logits, "forward" computes all logits, "training" is forward and backward of the loss,
"decoding" is one token per row after the prefill.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts.floor import write_json  # before torch

import torch  # isort: skip
from tqdm import tqdm

from melodi_hf import (
    MelodiCache,
    MelodiConfig,
    MelodiForCausalLM,
    TransformerXLConfig,
    TransformerXLForCausalLM,
)
from melodi_hf.evaluation.command_line import output_file, positive_int, print_device

ROWS = 8
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1024,
    "window_length": 128,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
MELODI = {
    "num_summary_tokens": 32,
    "num_short_memory_tokens": 32,
    "long_memory_layers": (2,),
    "num_long_memory_tokens": 16,
    "long_memory_windows": 32,
}
# Lengths in windows, with a mean of 5.
LENGTHS = {
    "evenly spread": [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5],
    "one is long": [2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7, 23.2],
    "one is short": [5.6, 5.6, 5.6, 5.6, 5.6, 5.6, 5.6, 0.8],
}


def batch(lengths, vocab_size, side):
    """Make ids and mask of rows with the given lengths, padded on one side."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        columns = slice(0, length) if side == "right" else slice(max(lengths) - length, None)
        ids[row, columns] = torch.randint(1, vocab_size, (length,))
        mask[row, columns] = 1
    return ids, mask


def make_workloads(model, ids, mask):
    """Return the workloads by name."""
    given = None if mask.all() else mask
    labels = ids.masked_fill(mask == 0, -100)
    cache = MelodiCache(model.config)
    with torch.no_grad():
        model(ids, attention_mask=given, cache=cache, logits_to_keep=1)

    @torch.no_grad()
    def prefill():
        fresh = MelodiCache(model.config)
        model(ids, attention_mask=given, cache=fresh, logits_to_keep=1)

    @torch.no_grad()
    def forward():
        model(ids, attention_mask=given, use_cache=False)

    def training():
        model.zero_grad(set_to_none=True)
        model(ids, attention_mask=given, labels=labels, use_cache=False).loss.backward()

    @torch.no_grad()
    def decoding():
        for _ in range(8):
            model(ids[:, -1:], cache=cache)

    return {"prefill": prefill, "forward": forward, "training": training, "decoding": decoding}


def seconds(work):
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(model, lengths, side, rounds):
    """Return the median ratio of ragged to equal rows for each workload."""
    tokens, vocab_size = sum(lengths), model.config.vocab_size
    equal = make_workloads(model, *batch([tokens // ROWS] * ROWS, vocab_size, side))
    ragged = make_workloads(model, *batch(lengths, vocab_size, side))
    ratios = {}
    for name, work in ragged.items():
        seconds(work), seconds(equal[name])  # warm-up
        pairs = [(seconds(work), seconds(equal[name])) for _ in range(rounds)]
        ratios[name] = round(statistics.median(a / b for a, b in pairs), 3)
    return ratios


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=positive_int, default=7)
    parser.add_argument("--output", type=output_file, default="benchmarks/results/ragged.json")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a smoke test")
    args = parser.parse_args()
    print_device("cpu", torch.float32)
    torch.manual_seed(0)
    sizes = SIZES | ({"window_length": 16, "num_hidden_layers": 3} if args.tiny else {})
    models = {
        "MELODI": MelodiForCausalLM(MelodiConfig(**sizes, **MELODI)),
        "Transformer-XL": TransformerXLForCausalLM(TransformerXLConfig(**sizes)),
    }
    rows = []
    cases = [(m, d, s) for m in models for d in LENGTHS for s in ("left", "right")]
    for name, described, side in tqdm(cases, desc="cases", unit="case"):
        model = models[name].eval()
        lengths = [round(n * model.config.window_length) for n in LENGTHS[described]]
        ratios = compare(model, lengths, side, args.rounds)
        rows.append({"model": name, "lengths": described, "padding": side} | ratios)
    result = {"rows": rows, "sizes": sizes | MELODI, "lengths in windows": LENGTHS}
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    write_json(result, args.output)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
