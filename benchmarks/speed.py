"""Measure training, prefill and decoding relative to their lower bounds ("floor").

    python benchmarks/speed.py [--sizes reference paper] [--threads 1] [--device cpu]
        [--output benchmarks/results/speed.json] [--tiny]

The floor is the time that a phase must take: its FLOPs (pairs that see each other) over the rate of
matrix products, or its bytes over the rate of reading as many (methods of the configuration,
`benchmarks/parts/floor.py`). Rates are measured before and after each measurement, rounds alternate
between the phases, and medians are reported. The queue is full.

    training step        forward and backward of one segment, with the loss of the Trainer
                         (`skip_logits`); no update
    forward              one segment without a cache or gradients, all logits
    prefill              one segment with a cache, the last logits only
    decoding step        one token of one row, which reads weights and memory once
    the same, compiled   as in `generate(cache_implementation="static")`
    closing a window     extra latency of the token that completes a window

Then the latency of a token after 4 000 and after 1 000 000 tokens is compared, alternating over a
whole window. At a small width both documents are read. At the reference size the state of the long
document is a copy with a full queue and a token count of 1 000 000.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts.floor import Machine, run_in_subprocess, write_json  # before torch

import torch  # isort: skip
from tqdm import tqdm
from transformers.cache_utils import StaticCache

from benchmarks.read_million import SMALL, draw_parts
from melodi_hf import MelodiCache, MelodiConfig, MelodiForCausalLM
from melodi_hf.evaluation.command_line import device_name, output_file, positive_int, print_device
from melodi_hf.models.cache import shared_state
from melodi_hf.models.decoder import Memory
from melodi_hf.models.generation import CompiledSteps
from melodi_hf.models.windows import Progress

SEGMENT = 4096  # tokens
DOCUMENTS = 4_000, 1_000_000  # tokens read before latencies are compared
TINY = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "window_length": 32,
    "num_summary_tokens": 8,
    "num_short_memory_tokens": 8,
    "long_memory_layers": (1,),
    "num_long_memory_tokens": 4,
    "long_memory_windows": 16,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}


def reference_config():
    """Return the reference size of the benchmark."""
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


class Size(NamedTuple):
    """A configuration and the lengths of its measurements."""

    config: MelodiConfig
    segment: int  # tokens
    rounds: int
    decoded: int  # tokens per round, the last of which completes a window
    trains: bool


def sizes(tiny, is_cuda):
    """Return the sizes by name.

    At the paper's size training and compilation are measured on GPUs only: a training step takes
    minutes and 10 GB on a CPU.
    """
    if tiny:
        return {"tiny": Size(MelodiConfig(**TINY), 128, 2, 16, True)}
    paper = MelodiConfig(dropout=0.0, attention_dropout=0.0)
    return {
        "reference": Size(reference_config(), SEGMENT, 4, 128, True),
        "paper": Size(paper, SEGMENT, 7 if is_cuda else 2, 64, is_cuda),
    }


def build(config, machine):
    torch.manual_seed(0)
    with machine.device:
        return MelodiForCausalLM(config).to(machine.dtype).eval()


def draw(config, tokens, machine):
    return torch.randint(0, config.vocab_size, (1, tokens), device=machine.device)


def full_memory(model):
    """Make a memory with random values and a full queue."""
    config, empty = model.config, model.model.empty_memory(1)
    layers = tuple(type(layer)(*(torch.randn_like(t) for t in layer)) for layer in empty.layers)
    tokens = config.long_memory_windows * config.window_length
    return Memory(layers, Progress(torch.tensor([tokens], device=model.device), 0))


def train(model, ids, memory):
    """Run forward and backward of the loss without all logits."""
    how = {"memory": memory, "return_memory": True, "skip_logits": True}
    model(ids, labels=ids, **how).loss.backward()


@torch.inference_mode()
def read(model, ids, cache):
    """Read a row in one call; return the logits of the last token."""
    return model(input_ids=ids, cache=cache, logits_to_keep=1).logits


def fill_cache(cache, tokens):
    """Return a copy of a cache with a full queue and a token count of `tokens`.

    `tokens` must be at the same position within a window.
    """
    twin = cache.clone()
    for layer in twin.layers:
        keys = torch.randn_like(layer.memory.long_keys)
        layer.memory = layer.memory._replace(
            long_keys=torch.nn.functional.normalize(keys, dim=-1),
            long_values=torch.randn_like(layer.memory.long_values),
        )
    state = shared_state(twin)
    count = torch.full_like(state.progress.tokens_read, tokens)
    state.progress, state.columns = Progress(count, tokens % state.window_length), tokens
    return twin


def full_cache(model, machine):
    """Make a cache at a window boundary with a full queue."""
    config, cache = model.config, MelodiCache(model.config)
    read(model, draw(config, config.window_length, machine), cache)
    return fill_cache(cache, config.long_memory_windows * config.window_length)


class Compiled:
    """Decoding as in `generate` with a static cache."""

    def __init__(self, model, size, machine):
        self.model, self.size, self.machine = model, size, machine
        backend = "eager" if machine.hasty else "inductor"
        step = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
        self.steps = CompiledSteps(model, step)
        self.cache = StaticCache(config=model.config, max_cache_len=1)
        with torch.inference_mode():
            self.read(model.config.window_length)
            for layer in self.cache.layers:
                for tensor in (layer.memory.long_keys, layer.memory.long_values):
                    tensor.copy_(torch.nn.functional.normalize(torch.randn_like(tensor), dim=-1))

    def read(self, tokens):
        read(self.model, draw(self.model.config, tokens, self.machine), self.cache)

    def run(self):
        self.read(self.model.config.window_length - self.size.decoded)
        ids = draw(self.model.config, self.size.decoded, self.machine)
        self.steps.offsets = None  # to be read again
        times = latencies(self.steps, ids, self.cache, self.machine)
        return {"decoding step, compiled": statistics.median(times[:-1])}


def latencies(model, ids, cache, machine):
    """Return the seconds of each token."""
    return [machine.seconds(lambda one=one: read(model, one, cache)) for one in ids.split(1, dim=1)]


class Phase(NamedTuple):
    """A phase and its costs; `run` returns seconds by row of the table."""

    run: object
    flops: dict[str, int]
    bytes: dict[str, int]


def phases(model, size, machine):
    """Return the phases by name."""
    config, ids = model.config, draw(model.config, size.segment, machine)
    cache, memory = full_cache(model, machine), full_memory(model)
    before = config.window_length - size.decoded  # tokens of the window before decoding
    begun = cache.clone()
    read(model, draw(config, before, machine), begun)

    def training():
        model.zero_grad(set_to_none=True)

        def step():
            train(model, ids, memory)

        return {"training step": machine.seconds(step)}

    @torch.inference_mode()
    def forward():
        return {"forward": machine.seconds(lambda: model(ids, memory=memory, return_memory=True))}

    def prefill():
        fresh = cache.clone()
        return {"prefill": machine.seconds(lambda: read(model, ids, fresh))}

    def decoding():
        times = latencies(model, ids[:, : size.decoded], begun.clone(), machine)
        typical = statistics.median(times[:-1])
        return {"decoding step": typical, "closing a window": times[-1] - typical}

    head = 2 * config.hidden_size * config.vocab_size
    prefilled = config.forward_flops(size.segment, with_logits=False) + head
    number, middle = machine.dtype.itemsize, before + size.decoded // 2
    of_a_token = {"decoding step": config.decoding_bytes(middle, number)}
    found = {
        "forward": Phase(forward, {"forward": config.forward_flops(size.segment)}, {}),
        "prefill": Phase(prefill, {"prefill": prefilled}, {}),
        "decoding": Phase(decoding, {"closing a window": config.window_end_flops()}, of_a_token),
    }
    if size.trains:
        of_a_token = {"decoding step, compiled": of_a_token["decoding step"]}
        found["compiled"] = Phase(Compiled(model, size, machine).run, {}, of_a_token)
        work = config.training_flops(size.segment)
        found = {"training": Phase(training, {"training step": work}, {})} | found
    return found


def measure(named, size, machine):
    """Measure all rounds; return seconds and floor by row."""
    times, floors, rates = {}, {}, {"GFLOP/s": [], "GB/s read": [], "GB/s copied": []}
    for phase in named.values():
        phase.run()  # warm-up
    for _ in tqdm(range(size.rounds), desc="rounds", unit="round"):
        for phase in named.values():
            before = both_rates(phase, machine)
            found = phase.run()
            matmul, reading = (
                (a + b) / 2 for a, b in zip(before, both_rates(phase, machine), strict=True)
            )
            rates["GFLOP/s"].append(round(matmul / 1e9, 1))
            rates["GB/s read"].append(round(reading / 1e9, 2))
            for row, seconds in found.items():
                floor = max(phase.flops.get(row, 0) / matmul, phase.bytes.get(row, 0) / reading)
                times.setdefault(row, []).append(seconds)
                floors.setdefault(row, []).append(floor)
        rates["GB/s copied"].append(round(machine.copy_rate() / 1e9, 2))
    return times, floors, rates


def both_rates(phase, machine):
    return machine.matmul_rate(), machine.read_rate(max(phase.bytes.values(), default=1 << 20))


def make_rows(name, named, times, floors):
    """Make the rows of the table."""
    flops = {row: count for phase in named.values() for row, count in phase.flops.items()}
    read = {row: count for phase in named.values() for row, count in phase.bytes.items()}
    return [
        {
            "size": name,
            "phase": row,
            "share of the floor": round(statistics.median(map(share, floors[row], times[row])), 3),
            "ms": round(1e3 * statistics.median(times[row]), 2),
            "floor, ms": round(1e3 * statistics.median(floors[row]), 2),
            "GFLOP": round(flops[row] / 1e9, 1) if row in flops else None,
            "MB read": round(read[row] / 1e6, 1) if row in read else None,
        }
        for row in times
    ]


def window_end_row(name, length, times):
    """Make the row about the latency at the end of a window."""
    typical, more = (
        1e3 * statistics.median(times[row]) for row in ("decoding step", "closing a window")
    )
    return {
        "size": name,
        "median token, ms": round(typical, 2),
        "token that closes a window, ms": round(typical + more, 2),
        "ratio": round(1 + more / typical, 2),
        "closing per token of a window, ms": round(more / length, 3),
        "part of the median": round(more / length / typical, 4),
    }


def share(floor, seconds):
    return floor / seconds


def peak_of_training(request):
    """Measure the peak memory of two training steps above the loaded model, in this process."""
    name, tiny, device, threads = request
    machine = Machine(device, threads, tiny)
    size = sizes(tiny, machine.is_cuda)[name]
    model, ids = build(size.config, machine), draw(size.config, size.segment, machine)
    before = machine.reset_peak()
    memory = full_memory(model)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        train(model, ids, memory)
    return {
        "model, MB": round(before / 1e6),
        "above it, MB": round((machine.peak() - before) / 1e6),
    }


def compare(model, caches, tokens, machine):
    """Measure the milliseconds of tokens, alternating between two caches."""
    times = [], []
    for step, one in enumerate(draw(model.config, tokens, machine).split(1, dim=1)):
        for which in (0, 1) if step % 2 else (1, 0):
            work = machine.seconds(lambda one=one, cache=caches[which]: read(model, one, cache))
            times[which].append(1e3 * work)
    return times


def latency_row(name, documents, how, times):
    short, long = times
    return {
        "size": name,
        "short document, tokens": documents[0],
        "long document, tokens": documents[1],
        "its state": how,
        "median ms after the short": round(statistics.median(short), 3),
        "after the long": round(statistics.median(long), 3),
        "ratio of medians": round(statistics.median(long) / statistics.median(short), 3),
        "ratio of means": round(statistics.fmean(long) / statistics.fmean(short), 3),
    }


def latency(machine, tiny):
    """Compare the latency of tokens after a short and after a long document."""
    documents = (400, 1000) if tiny else DOCUMENTS
    config = MelodiConfig(**(TINY if tiny else SMALL))
    model, length = build(config, machine), config.window_length
    caches = [
        model.read_document(draw_parts(config.vocab_size, tokens), progress=None)
        for tokens in documents
    ]
    times = compare(model, caches, length, machine)
    rows = [latency_row("small width", documents, "read", times)]
    model = build(config if tiny else reference_config(), machine)
    caches = set_caches(model, documents, machine)
    times = compare(model, caches, model.config.window_length, machine)
    return [*rows, latency_row("reference", documents, "set", times)]


def set_caches(model, documents, machine):
    """Make the cache of a short document, and one set to the state of a long document."""
    (short, long), cache = documents, MelodiCache(model.config)
    read(model, draw(model.config, short, machine), cache)
    twin, missing = cache.clone(), (long - short) % model.config.window_length
    if missing:  # to be at the same slot of a window
        read(model, draw(model.config, missing, machine), twin)
    return [cache, fill_cache(twin, long)]


def config_sizes(config):
    """Return the fields that determine the size."""
    return {name: x for name, x in config.to_diff_dict().items() if name != "transformers_version"}


def measure_all(args, machine):
    """Measure all sizes; the JSON is written after each."""
    known = sizes(args.tiny, machine.is_cuda)
    result = {"rows": [], "tables": {"pause": [], "peak": [], "latency": []}, "by size": {}}
    result |= machine.describe() | {"tokens": SEGMENT}
    for name in ("tiny",) if args.tiny else args.sizes:
        size = known[name]
        model = build(size.config, machine)
        named = phases(model, size, machine)
        times, floors, rates = measure(named, size, machine)
        result["rows"] += make_rows(name, named, times, floors)
        result["tables"]["pause"].append(window_end_row(name, size.config.window_length, times))
        del model, named
        every = {"seconds": times, "floors": floors, "rates": rates}
        result["by size"][name] = every | {"config": config_sizes(size.config)}
        if size.trains:
            request = name, args.tiny, args.device, args.threads
            peak = run_in_subprocess(__file__, request, trim_heap=True)
            result["tables"]["peak"].append({"size": name} | peak)
        else:
            result["by size"][name]["left out"] = "the training step: about 10 GB and minutes each"
        write_json(result, args.output)
    result["tables"]["latency"] = latency(machine, args.tiny)
    write_json(result, args.output)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=["reference", "paper"])
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--threads", type=positive_int, default=1, help="1: CPU seconds; else wall")
    parser.add_argument("--output", type=output_file, default="benchmarks/results/speed.json")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a smoke test")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.sizes = args.sizes or ["reference", "paper"]
    if args.child:
        print(json.dumps(peak_of_training(json.loads(args.child))))
        return
    machine = Machine(args.device, args.threads, args.tiny)
    print_device(machine.device, machine.dtype)
    result = measure_all(args, machine)
    print(json.dumps({"rows": result["rows"]} | result["tables"], indent=1))


if __name__ == "__main__":
    main()
