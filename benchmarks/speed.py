"""Forward and backward at the reference size against the floor, in one run on this machine.

    python benchmarks/speed.py [--rounds 5] [--output benchmarks/results/speed.json] [--tiny]

The floor is the time that the matrix products of the model must take: their FLOPs (pairs that see
each other, `melodi_hf.models.costs`) over the matmul rate that this machine reached just before and
just after. Rounds alternate between the parts, and medians are reported, since a machine
with other work on it is slower from one minute to the next. The queue is full, as it is after
65 536 tokens, so that nothing is saved by its being empty.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

# Threads that wait soon give their core away: beside another program, spinning costs tenfold.
os.environ["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "10000")

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from melodi_hf import MelodiConfig, MelodiForCausalLM
from melodi_hf.models.costs import forward_flops, training_flops
from melodi_hf.models.decoder import Memory
from melodi_hf.models.windows import Progress

SEGMENT = 4096  # tokens


def reference_config():
    """The reference size of the benchmark."""
    return MelodiConfig(
        vocab_size=32000,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        head_dim=64,
        intermediate_size=2048,
        window_length=512,
        num_summary_tokens=64,
        num_short_memory_tokens=64,
        long_memory_layers=(4,),
        num_long_memory_tokens=32,
        long_memory_windows=128,
        dropout=0.0,
        attention_dropout=0.0,
    )


def full_memory(model):
    """A memory as after reading as many windows as the queue holds: every slot is filled."""
    config, empty = model.config, model.model.empty_memory(1)
    layers = tuple(type(held)(*(torch.randn_like(t) for t in held)) for held in empty.layers)
    tokens = config.long_memory_windows * config.window_length
    return Memory(layers, Progress(torch.tensor([tokens]), 0))


def matmul_rate(size, seconds):
    """FLOPs per second of float32 products of `size` x `size`, the median over `seconds`."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)


def parts(model, ids):
    """What is measured: name -> (a function that does it once, its FLOPs)."""
    memory = full_memory(model)

    def forward():
        with torch.inference_mode():
            model(ids, memory=memory, return_memory=True)

    def forward_and_backward():
        model.zero_grad(set_to_none=True)
        model(ids, memory=memory, return_memory=True, labels=ids).loss.backward()

    tokens = ids.shape[1]
    return {
        "forward": (forward, forward_flops(model.config, tokens)),
        "forward + backward": (forward_and_backward, training_flops(model.config, tokens)),
    }


def measure(measured, rounds, size, seconds):
    """Share of the floor that each part reaches, round by round."""
    shares = {name: [] for name in measured}
    times = {name: [] for name in measured}
    for work, _ in measured.values():
        work()  # buffers are allocated, kernels chosen
    rates = [matmul_rate(size, seconds)]
    for _ in tqdm(range(rounds), desc="rounds", unit="round"):
        for name, (work, flops) in measured.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
            rates.append(matmul_rate(size, seconds))
            shares[name].append(flops / ((rates[-1] + rates[-2]) / 2) / times[name][-1])
    return shares, times, rates


def recorded(config):
    """The fields that make the size."""
    return {name: x for name, x in config.to_diff_dict().items() if name != "transformers_version"}


def report(measured, shares, times, rates, config):
    """The JSON of record."""
    rows = [
        {
            "part": name,
            "share of the floor": round(statistics.median(shares[name]), 3),
            "seconds": round(statistics.median(times[name]), 3),
            "floor, seconds": round(flops / statistics.median(rates), 3),
            "GFLOP": round(flops / 1e9, 1),
        }
        for name, (_, flops) in measured.items()
    ]
    return {
        "rows": rows,
        "shares by round": shares,
        "seconds by round": times,
        "matmul GFLOP/s": [round(rate / 1e9, 1) for rate in rates],
        "peak memory GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "config": recorded(config),
        "tokens": SEGMENT,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speed.json"))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args()
    torch.manual_seed(0)
    config, tokens, size, seconds = reference_config(), SEGMENT, 2048, 1.0
    if args.tiny:
        config = MelodiConfig(
            **{**config.to_diff_dict(), "window_length": 32, "hidden_size": 64, "vocab_size": 100}
        )
        tokens, size, seconds = 128, 128, 0.01
    model = MelodiForCausalLM(config)
    measured = parts(model, torch.randint(0, config.vocab_size, (1, tokens)))
    result = report(measured, *measure(measured, args.rounds, size, seconds), config)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("rows", "peak memory GB")}, indent=1))


if __name__ == "__main__":
    main()
