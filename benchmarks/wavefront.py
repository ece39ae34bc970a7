"""What reading by diagonals gains over reading layer by layer, for sizes of the model and the call.

    python benchmarks/wavefront.py [--rounds 7] [--output benchmarks/results/wavefront.json]
                                   [--size cells|reference|paper] [--device cpu|cuda] [--tiny]

Each round measures both schedules one after the other, and the median of the rounds' ratios is
reported, layers / wavefront: above 1 the wavefront is faster. "prefill" reads into a cache and
gives the last logits, "training" is forward and backward of the loss. On a CPU seconds are CPU
seconds of one thread, in float32; on a GPU they are seconds until the device is done, with float32
weights under bfloat16 autocast.

"work of a cell" is B W D² (rows, tokens of a window, channels), "cells per step" N K / (N + K - 1).
`cells` are small models, `reference` is one of 8 layers of 512 channels and windows of 512, `paper`
is MELODI's of 12 layers of 1024, which reads 65 536 tokens and trains on segments of 4096; these
two are measured in 3 rounds.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts.floor import Machine, write  # before torch

import torch  # isort: skip
from tqdm import tqdm

from melodi_hf import (
    MelodiCache,
    MelodiConfig,
    MelodiForCausalLM,
    TransformerXLConfig,
    TransformerXLForCausalLM,
)
from melodi_hf.evaluation.command_line import device_name, output_file, positive_int, print_device

CLASSES = {
    "MELODI": (MelodiConfig, MelodiForCausalLM),
    "Transformer-XL": (TransformerXLConfig, TransformerXLForCausalLM),
}
# Model, layers, channels, window, rows, windows of a prefill, windows of a training step.
CELLS = [
    ("MELODI", 2, 64, 16, 1, 16, 16),
    ("MELODI", 4, 64, 16, 1, 2, 2),
    ("MELODI", 4, 64, 16, 1, 4, 4),
    ("MELODI", 12, 64, 16, 1, 2, 2),
    ("MELODI", 4, 64, 16, 1, 8, 8),
    ("MELODI", 4, 64, 16, 1, 32, 32),
    ("MELODI", 4, 64, 16, 8, 8, 8),
    ("MELODI", 4, 128, 16, 1, 8, 8),
    ("MELODI", 4, 128, 16, 1, 32, 32),
    ("MELODI", 4, 128, 16, 4, 4, 4),
    ("MELODI", 4, 128, 16, 4, 8, 8),
    ("MELODI", 4, 128, 16, 8, 8, 8),
    ("MELODI", 4, 128, 16, 8, 32, 32),
    ("MELODI", 8, 128, 16, 1, 8, 8),
    ("MELODI", 8, 128, 16, 1, 32, 32),
    ("MELODI", 4, 128, 64, 1, 8, 8),
    ("MELODI", 4, 128, 128, 1, 8, 8),
    ("MELODI", 4, 128, 64, 8, 8, 8),
    ("MELODI", 4, 256, 32, 1, 8, 8),
    ("MELODI", 4, 256, 32, 1, 32, 32),
    ("MELODI", 4, 256, 32, 8, 8, 8),
    ("MELODI", 4, 256, 128, 1, 8, 8),
    ("MELODI", 8, 256, 128, 1, 8, 8),
    ("Transformer-XL", 4, 64, 16, 1, 8, 8),
    ("Transformer-XL", 4, 128, 16, 1, 8, 8),
    ("Transformer-XL", 4, 128, 16, 8, 8, 8),
    ("Transformer-XL", 8, 128, 16, 1, 32, 32),
    ("Transformer-XL", 4, 256, 32, 1, 8, 8),
    ("Transformer-XL", 4, 256, 128, 1, 8, 8),
]
CASES = {
    "cells": CELLS,
    "reference": [("MELODI", 8, 512, 512, 1, 4, 4)],
    "paper": [("MELODI", 12, 1024, 512, rows, 128, 8) for rows in (1, 4, 16)],
    "tiny": [("MELODI", 2, 32, 8, 1, 2, 2), ("Transformer-XL", 2, 32, 8, 1, 2, 2)],
}


def build(name, layers, hidden, window):
    """A model of the proportions of the paper's: heads of 64 channels or less, U = S = W / 4."""
    config_class, model_class = CLASSES[name]
    head_dim = min(64, hidden // 2) if hidden < 1024 else 128
    sizes = {
        "vocab_size": 512 if hidden < 512 else 32128,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // head_dim,
        "head_dim": head_dim,
        "intermediate_size": 4 * hidden,
        "window_length": window,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if name == "MELODI":
        sizes |= {
            "num_summary_tokens": window // 4,
            "num_short_memory_tokens": window // 4,
            "long_memory_layers": (layers // 2,),
            "num_long_memory_tokens": window // 8,
            "long_memory_windows": 128 if window >= 512 else 32,
        }
    return model_class(config_class(**sizes))


def works(model, rows, prefilled, trained):
    """What is measured: name -> a function that does it once."""
    window, device = model.config.window_length, model.device
    half = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
    document = torch.randint(1, 512, (rows, prefilled * window), device=device)
    segment = document[:, : trained * window]

    @torch.no_grad()
    def prefill():
        with half:
            model(document, cache=MelodiCache(model.config), logits_to_keep=1)

    def training():
        model.zero_grad(set_to_none=True)
        with half:
            loss = model(segment, labels=segment, skip_logits=True, use_cache=False).loss
        loss.backward()

    return {"prefill": prefill, "training": training}


def compare(model, work, rounds, machine):
    """Seconds layer by layer, and how much longer that takes than by diagonals."""

    def by(schedule):
        model.config.schedule = schedule
        return machine.seconds(work)

    by("layers"), by("wavefront")  # buffers are allocated
    pairs = [(by("layers"), by("wavefront")) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    return round(statistics.median(a for a, _ in pairs), 4), round(ratio, 3)


def measure(case, rounds, machine):
    """One row of the result."""
    name, layers, hidden, window, rows, prefilled, trained = case
    torch.manual_seed(0)
    model = build(name, layers, hidden, window).to(machine.device)
    row = {"model": name, "layers": layers, "hidden": hidden, "window": window, "rows": rows}
    row |= {"windows": prefilled, "work of a cell": rows * window * hidden**2}
    rounds = rounds if hidden < 512 else min(rounds, 3)
    row["cells per step"] = round(layers * prefilled / (layers + prefilled - 1), 2)
    for kind, work in works(model, rows, prefilled, trained).items():
        taken, ratio = compare(model.train(kind == "training"), work, rounds, machine)
        row |= {f"{kind} by layers, s": taken, f"{kind}: layers / wavefront": ratio}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=positive_int, default=7)
    parser.add_argument("--output", type=output_file, default="benchmarks/results/wavefront.json")
    parser.add_argument("--size", nargs="+", choices=CASES, default=["cells", "reference"])
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args()
    machine = Machine(args.device)
    print_device(machine.device, machine.dtype)
    sizes = ["tiny"] if args.tiny else args.size
    cases = [case for size in sizes for case in CASES[size]]
    rows = [measure(case, args.rounds, machine) for case in tqdm(cases, desc="cases", unit="case")]
    rows.sort(key=lambda row: (row["model"], row["work of a cell"]))
    name = torch.cuda.get_device_name() if machine.is_cuda else "cpu"
    result = {"rows": rows, "device": name, "rounds": args.rounds}
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    write(result, args.output)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
