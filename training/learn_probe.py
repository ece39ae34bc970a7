"""Train small models on a probe, to measure the capacity of each kind of memory.

    python training/learn_probe.py --output model_cards/probes/copy.json

All `MODELS` are trained for the same number of steps on the same examples, with distances drawn
from --train-distances. They are tested at --distances, most of which are not in training. A text
contains only the probe, so correct answers beyond the window come from the memory. The plot shows
the mean and the range over seeds; for a single seed, 95 % intervals.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import parts.threads  # noqa: F401  # before torch

# isort: split

import numpy as np
import torch
from record import environment, write_json
from tqdm import trange
from transformers import PreTrainedModel, set_seed

from melodi_hf import (
    MelodiConfig,
    MelodiForCausalLM,
    TransformerXLConfig,
    TransformerXLForCausalLM,
)
from melodi_hf.evaluation.command_line import (
    FAILURES,
    non_negative_int,
    one_line,
    output_file,
    positive_float,
    positive_int,
    print_device,
    require_packages,
    seed_number,
)
from melodi_hf.evaluation.probe_plots import plot_by_distance
from melodi_hf.evaluation.probes import MAKERS, TEXT_PROBES, Material, make_examples
from melodi_hf.evaluation.probing import evaluate_probe

WINDOW = 16  # tokens
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "window_length": WINDOW,
    "mask_empty_memory": True,
    "initial_embedding_std": 0.3,
    "initial_temperature": 6.0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
MELODI: dict[str, Any] = {
    "num_summary_tokens": 8,
    "num_short_memory_tokens": 8,
    "long_memory_layers": (1,),
    "num_long_memory_tokens": 4,
    "long_memory_windows": 16,
}
NO_SHORT, NO_LONG = {"num_short_memory_tokens": 0}, {"long_memory_layers": ()}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "short and long": (MelodiConfig, MELODI),
    "short only": (MelodiConfig, MELODI | NO_LONG),
    "long only": (MelodiConfig, MELODI | NO_SHORT),
    "no memory": (MelodiConfig, MELODI | NO_SHORT | NO_LONG),
    "Transformer-XL": (TransformerXLConfig, {}),
}
CLASSES = {MelodiConfig: MelodiForCausalLM, TransformerXLConfig: TransformerXLForCausalLM}
WARMUP = 50  # steps


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train small models on a probe.")
    of_ids = sorted(MAKERS.keys() - set(TEXT_PROBES))
    parser.add_argument("--probe", choices=of_ids, default="copy")
    parser.add_argument(
        "--size", type=positive_int, default=8, metavar="N", help="symbols or pairs"
    )
    parser.add_argument("--vocab-size", type=positive_int, default=18, metavar="N")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--train-distances", nargs="+", type=non_negative_int, default=[0, 16, 48])
    parser.add_argument(
        "--distances",
        nargs="+",
        type=non_negative_int,
        default=[0, 16, 32, 64, 96, 128, 192, 256, 384],
    )
    parser.add_argument(
        "--examples", type=positive_int, default=48, metavar="N", help="examples per distance"
    )
    parser.add_argument("--steps", type=positive_int, default=300)
    parser.add_argument("--num-rows", type=positive_int, default=32, help="examples per step")
    parser.add_argument("--learning-rate", type=positive_float, default=5e-3)
    parser.add_argument("--seeds", nargs="+", type=seed_number, default=[0, 1])
    parser.add_argument("--output", type=output_file, metavar="FILE", help="JSON file to write")
    return parser.parse_args(arguments)


def build(name: str, vocab_size: int, seed: int) -> PreTrainedModel:
    config_class, sizes = MODELS[name]
    set_seed(seed)
    config = config_class(vocab_size=vocab_size, **SIZES | sizes)
    return CLASSES[config_class](config)


def learn(
    model: PreTrainedModel, options: argparse.Namespace, seed: int, label: str
) -> list[float]:
    """Train the model in place; return the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.01)
    total = options.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, (total - step) / total)
    )
    random = np.random.default_rng(seed)
    losses: list[float] = []
    model.train()
    for _ in (bar := trange(total, desc=label)):
        ids, targets = draw_batch(random, options)
        loss = model(ids, shift_labels=targets, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    return losses


def draw_batch(random: np.random.Generator, options: argparse.Namespace):
    """Draw ids and targets (B T) at one of the training distances."""
    examples = make_examples(
        options.probe,
        int(random.choice(options.train_distances)),
        options.num_rows,
        Material(options.vocab_size),
        size=options.size,
        seed=int(random.integers(1, 2**32)) << 32,  # disjoint from the seeds of the evaluation
    )
    texts = [example.text for example in examples]
    ids, targets = (np.stack([text[field] for text in texts]) for field in (0, 1))
    return torch.from_numpy(ids), torch.from_numpy(targets)


def run(name: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    began = time.process_time()
    model = build(name, options.vocab_size, seed)
    label = f"{name}, seed {seed}"
    losses = learn(model, options, seed, label)
    material = Material(options.vocab_size)
    count, size = options.examples, options.size
    examples = [
        example
        for distance in options.distances
        for example in make_examples(options.probe, distance, count, material, size=size, seed=0)
    ]
    rows = evaluate_probe(model, examples, num_rows=count, name=label)
    return {
        "seed": seed,
        "parameters": model.num_parameters(),
        "memory_floats": model.config.memory_floats(),
        "last_loss": float(np.mean(losses[-20:])),
        "cpu_seconds": time.process_time() - began,
        "rows": rows,
    }


def average_over_seeds(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average rows over seeds, with the lowest and highest; a single run is unchanged."""
    if len(runs) == 1:
        return runs[0]["rows"]
    merged = []
    for rows in zip(*(run["rows"] for run in runs), strict=True):
        found = [row["accuracy"] for row in rows]
        low, high = {"low": min(found)}, {"high": max(found)}
        merged.append(rows[0] | {"accuracy": float(np.mean(found))} | low | high)
    return merged


def compare(options: argparse.Namespace) -> None:
    given = {name: x for name, x in vars(options).items() if name != "output"}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.models}
    print_device("cpu", torch.float32)
    for seed in options.seeds:
        for name in options.models:
            results[name].append(run(name, options, seed))
    lines = {name: average_over_seeds(runs) for name, runs in results.items()}
    for name, rows in lines.items():
        print(f"{name:>16}", *(f"{row['distance']}: {row['accuracy']:.2f} " for row in rows))
    if options.output is not None:
        sizes = {"sizes": SIZES, "melodi": MELODI}
        write_json(options.output, {**given, **sizes, "models": results, **environment()})
        queue = MELODI["long_memory_windows"] * WINDOW
        marks = {"window": WINDOW, "trained": max(options.train_distances), "queue": queue}
        plot_by_distance(lines, options.output, marks=marks)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        if options.output is not None:
            require_packages("train", "matplotlib")
        compare(options)
    except FAILURES as error:
        sys.exit(f"learn_probe.py: {one_line(error)}")


if __name__ == "__main__":
    main()
