"""Parity, precision, training, reading and decoding on one GPU, from a bare checkout.

    python benchmarks/gpu_suite.py [--minutes 9] [--output FILE] [--parts PART ...] [--tiny]

It needs torch, transformers, safetensors and numpy; the package need not be installed. Every part
stands alone: one that fails is recorded with its error and makes the exit status 1, one for which
no time is left is recorded as skipped. `--tiny` runs everything in seconds, on a CPU too.

What is measured, part by part:

    parity      the golden tensors in float32 without TF32
    precision   bfloat16 against float32, the same weights and tokens, one segment
    rates       the matrix products and copies that the device reaches, just before training
    training    float32 weights, bfloat16 autocast, the fused AdamW step included, memory carried
                from step to step; utilisation = FLOPs that must be done / (seconds * matmul rate)
    reading     bfloat16 weights, a long document in pieces
    decoding    bfloat16 weights, one window of greedy tokens; all that one token needs, waited for
    compiled    the training step with torch.compile, each layer by itself, then the whole model
"""

import argparse
import copy
import gc
import json
import math
import platform
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from melodi_hf import MelodiCache, MelodiConfig, MelodiForCausalLM, from_meliad
from melodi_hf.models.costs import training_flops
from tests import parity_report

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
RESERVE = 30  # seconds of the limit, for imports and for writing the results
ROUNDS = 7  # of a measured rate, whose median is taken


class Sizes(NamedTuple):
    """How large everything is."""

    config: dict
    segment: int  # tokens
    max_batch: int  # where the search ends if memory does not end it
    steps: int  # timed, at the batch that was found
    matmul_size: int
    matmul_dtype: torch.dtype
    copied_bytes: int
    document: int  # tokens
    decoded_after: tuple[int, ...]  # tokens read
    decoded_batches: tuple[int, ...]
    compile_backend: str


FULL = Sizes(
    config={},  # the defaults
    segment=4096,
    max_batch=512,
    steps=6,
    matmul_size=8192,
    matmul_dtype=torch.bfloat16,
    copied_bytes=4 * GIB,
    document=65536,
    decoded_after=(4096, 65536),
    decoded_batches=(1, 16),
    compile_backend="inductor",
)
TINY = Sizes(
    config={
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "window_length": 16,
        "num_summary_tokens": 4,
        "num_short_memory_tokens": 4,
        "long_memory_layers": (1,),
        "num_long_memory_tokens": 2,
        "long_memory_windows": 4,
    },
    segment=32,
    max_batch=2,
    steps=2,
    matmul_size=128,
    matmul_dtype=torch.float32,
    copied_bytes=1 << 20,
    document=128,
    decoded_after=(32, 64),
    decoded_batches=(1, 2),
    compile_backend="eager",
)


class OutOfTime(BaseException):
    """No `Exception`: what catches those must not catch this."""


class Bench:
    """The device, the sizes, the results so far, and the time that is left."""

    def __init__(self, sizes, seconds):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sizes, self.results = sizes, {}
        self.end = self.part_end = time.perf_counter() + seconds

    def left(self):
        """Seconds that the running part still has."""
        return self.part_end - time.perf_counter()

    def now(self):
        """The time, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work):
        start = self.now()
        work()
        return self.now() - start

    def free(self):
        """Give back what nothing holds any more, and forget the peak."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self):
        """The most memory that tensors held since `free`; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated() / GIB

    def model(self, **changes):
        """The same random model at each call, on the device."""
        torch.manual_seed(0)
        with self.device:
            return MelodiForCausalLM(MelodiConfig(**self.sizes.config, **changes))

    def ids(self, batch, tokens):
        vocabulary = MelodiConfig(**self.sizes.config).vocab_size
        return torch.randint(vocabulary, (batch, tokens), device=self.device)

    @contextmanager
    def limited_to(self, seconds):
        """Stop what is inside with `OutOfTime`."""

        def stop(*_):
            raise OutOfTime

        self.part_end = min(self.end, time.perf_counter() + seconds)
        previous = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(self.left(), 0.001))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


# Parts: each fills the dictionary it is given, so that what is stopped half-way is not lost.


def environment(bench, found):
    """What it ran on."""
    found |= {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": answer_of("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "device": platform.machine(),
        "model": bench.sizes.config or "defaults of MelodiConfig",
    }
    if bench.device.type == "cuda":
        device = torch.cuda.get_device_properties(0)
        query = "--query-gpu=driver_version", "--format=csv,noheader"
        found |= {
            "device": device.name,
            "memory GiB": device.total_memory / GIB,
            "cuda": torch.version.cuda,
            "driver": answer_of("nvidia-smi", *query),
        }


def answer_of(*command):
    """The first line that a command prints; None if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [None])[0]


def parity(bench, found):
    """The worst difference per kind of tensor, of all golden files and file by file."""
    worst, by_file = {}, {}
    for path in parity_report.golden_files():
        kinds = by_file.setdefault(path.stem, {})
        model = from_meliad(path).to(bench.device)
        for name, difference in parity_report.measure(path, model).items():
            kind = parity_report.kind_of(name)
            kinds[kind] = max(kinds.get(kind, 0.0), difference)
            worst[kind] = max(worst.get(kind, 0.0), difference)
    goal = 1e-4 if bench.device.type == "cuda" else 1e-5
    found |= {"worst": worst, "goal": goal, "within the goal": max(worst.values()) <= goal}
    found["files"] = by_file


def precision(bench, found):
    """How far bfloat16 is from float32: under autocast, as in training, and with its weights."""
    model = bench.model().eval()
    ids = bench.ids(1, bench.sizes.segment)
    exact = logits_loss_gradients(model, ids)
    with torch.autocast(bench.device.type, torch.bfloat16):
        rounded = logits_loss_gradients(model, ids)
    found["autocast"] = deviation(exact, rounded)
    rounded = logits_loss_gradients(copy.deepcopy(model).to(torch.bfloat16), ids)
    found["bfloat16 weights"] = deviation(exact, rounded)


def logits_loss_gradients(model, ids):
    model.zero_grad(set_to_none=True)
    output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    named = model.named_parameters()
    gradients = {name: p.grad.float().clone() for name, p in named if p.grad is not None}
    return output.logits.detach().float(), output.loss.item(), gradients


def deviation(exact, rounded):
    """Both as `logits_loss_gradients` returns them."""
    difference, scale = rounded[0] - exact[0], exact[0].std()
    cosines = {
        name: torch.cosine_similarity(rounded[2][name].flatten(), gradient.flatten(), dim=0).item()
        for name, gradient in exact[2].items()
        if gradient.any()
    }
    worst = min(cosines, key=cosines.get)
    rms, largest = difference.square().mean().sqrt(), difference.abs().max()
    return {
        "rms difference of logits / their deviation": (rms / scale).item(),
        "largest difference of logits / their deviation": (largest / scale).item(),
        "loss in float32": exact[1],
        "difference of loss": rounded[1] - exact[1],
        "gradient cosine, median of parameters": statistics.median(cosines.values()),
        "gradient cosine, worst": cosines[worst],
        "worst parameter": worst,
    }


def rates(bench, found):
    """Medians after a warm-up, on random data."""
    size, dtype, products = bench.sizes.matmul_size, bench.sizes.matmul_dtype, 10
    a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def multiply():
        for _ in range(products):
            torch.mm(a, b, out=out)

    source = torch.ones(bench.sizes.copied_bytes // 4, device=bench.device)
    target = torch.empty_like(source)
    found |= {
        "matmul": f"{size} cubed, {str(dtype).removeprefix('torch.')}",
        "matmul TFLOP/s": 2 * size**3 * products / median_seconds(bench, multiply) / 1e12,
        "copy GB/s, read and written": 2
        * bench.sizes.copied_bytes
        / median_seconds(bench, lambda: target.copy_(source))
        / 1e9,
    }


def median_seconds(bench, work):
    for _ in range(2):
        work()
    return statistics.median(bench.seconds(work) for _ in range(ROUNDS))


def checkpoint(model):
    """Compute each layer anew in backward; newer versions of transformers renamed the method."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


class Training:
    """A model and its optimizer, timed at one batch size after another."""

    def __init__(self, bench, checkpointing=False, **changes):
        self.bench, self.model = bench, bench.model(**changes).train()
        if checkpointing:
            checkpoint(self.model)
        is_cuda = bench.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=is_cuda)
        self.tried = []

    def step(self, ids, memory):
        """One update -> the memory for the next segment."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.bench.device.type, torch.bfloat16):
            output = self.model(ids, labels=ids, memory=memory, return_memory=True, use_cache=False)
        output.loss.backward()
        self.optimizer.step()
        return output.memory

    def step_seconds(self, batch, steps):
        """Of each of `steps` steps; those before them, which build and warm up, are left out."""
        ids, memory = self.bench.ids(batch, self.bench.sizes.segment), None
        times = []
        for _ in range(2 + steps):
            start = self.bench.now()
            memory = self.step(ids, memory)
            times.append(self.bench.now() - start)
        return times[2:]

    def attempt(self, batch, steps=1):
        """The figures of a batch size, or why there are none."""
        self.bench.free()
        start, row = time.perf_counter(), {"batch": batch}
        try:
            seconds = statistics.median(self.step_seconds(batch, steps))
        except RuntimeError as error:  # torch.OutOfMemoryError is one, and so is cuBLAS's
            row["failed"] = str(error).splitlines()[0][:200]
        else:
            row |= self.figures(batch, seconds)
        self.model.zero_grad(set_to_none=True)
        row["seconds of the attempt"] = time.perf_counter() - start
        self.tried.append(row)
        return row

    def figures(self, batch, seconds):
        segment = self.bench.sizes.segment
        rate = self.bench.results.get("rates", {}).get("matmul TFLOP/s")
        teraflops = batch * training_flops(self.model.config, segment) / seconds / 1e12
        return {
            "tokens/s": batch * segment / seconds,
            "ms per step": seconds * 1e3,
            "TFLOP/s": teraflops,
            "utilisation": teraflops / rate if rate else None,
            "peak GiB": self.bench.peak_gib(),
        }

    def largest_batch(self):
        """Double until it fails, then narrow the gap to an eighth; 0 if nothing fits."""
        cap = self.bench.sizes.max_batch
        fits, fails, batch = 0, cap + 1, 1
        while fails - fits > max(1, fits // 8) and self.has_time_for(batch):
            if "failed" in self.attempt(batch):
                fails = batch
            else:
                fits = batch
            batch = min(2 * fits, cap) if fails > cap else (fits + fails) // 2
        return fits

    def fastest(self):
        """The attempt with the most tokens per second."""
        return max(self.tried, key=lambda row: row.get("tokens/s", 0.0), default=None)

    def has_time_for(self, batch, times_as_long=2.0):
        """Whether another attempt is likely to end before the part must."""
        if not self.tried:
            return True
        last = self.tried[-1]
        expected = last["seconds of the attempt"] * batch / last["batch"]
        return self.bench.left() > expected * times_as_long


def training(bench, found, **changes):
    """The largest batch that fits, its figures, and what each batch on the way gave."""
    run = Training(bench, **changes)
    found["tried"] = run.tried
    batch = run.largest_batch()
    if batch == 0:
        raise RuntimeError(f"no batch fits: {run.tried[-1].get('failed')}")
    found["largest batch"] = run.attempt(batch, bench.sizes.steps)
    found["fastest batch"] = run.fastest()
    run.step(bench.ids(1, bench.sizes.segment), None)  # gradients to step along
    found["AdamW alone, ms"] = median_seconds(bench, run.optimizer.step) * 1e3


def training_checkpointed(bench, found):
    """As `training`, with every layer computed anew in backward."""
    training(bench, found, checkpointing=True)


def training_without_dropout(bench, found):
    """At the batches that were tried with it."""
    rows = bench.results.get("training", {}).get("tried", [{"batch": 1}])
    run = Training(bench, dropout=0.0, attention_dropout=0.0)
    found["tried"] = run.tried
    for batch in sorted({row["batch"] for row in rows if "failed" not in row}):
        if run.has_time_for(batch):
            run.attempt(batch, bench.sizes.steps)
    found["fastest batch"] = run.fastest()


@torch.inference_mode()
def reading(bench, found):
    """A document of one row, in pieces of a segment."""
    model = bench.model().to(torch.bfloat16).eval()
    ids = bench.ids(1, bench.sizes.document)
    read(model, MelodiCache(model.config), ids[:, : 2 * bench.sizes.segment], bench)
    bench.free()
    cache = MelodiCache(model.config)
    seconds = bench.seconds(lambda: read(model, cache, ids, bench))
    found |= {
        "tokens": ids.shape[1],
        "seconds": seconds,
        "tokens/s": ids.shape[1] / seconds,
        "peak GiB": bench.peak_gib(),
        "memory bytes": cache.memory_bytes(),
    }


def read(model, cache, ids, bench):
    for piece in ids.split(bench.sizes.segment, dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)


@torch.inference_mode()
def decoding(bench, found):
    """Time and memory of a token, however much was read before."""
    model = bench.model().to(torch.bfloat16).eval()
    found["rows"] = []
    for batch in bench.sizes.decoded_batches:
        cache, read_so_far, held = MelodiCache(model.config), 0, set()
        bench.free()
        for tokens in bench.sizes.decoded_after:
            read(model, cache, bench.ids(batch, tokens - read_so_far), bench)
            row = {"batch": batch, "tokens read": tokens, **decode(model, cache, batch, bench)}
            found["rows"].append(row)
            held.add(row["memory bytes"])
            read_so_far = cache.get_seq_length()
        found[f"memory bytes equal, batch {batch}"] = len(held) == 1


def decode(model, cache, batch, bench):
    """Greedy tokens for one window, so that one window closes on the way."""
    ids, times = bench.ids(batch, 1), []
    for _ in range(model.config.window_length):
        start = bench.now()
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        times.append(bench.now() - start)
    return {
        "ms per token, median": statistics.median(times) * 1e3,
        "ms per token, mean": statistics.fmean(times) * 1e3,
        "ms of the slowest": max(times) * 1e3,
        "tokens/s": batch / statistics.fmean(times),
        "memory bytes": cache.memory_bytes(),
        "peak GiB": bench.peak_gib(),
    }


def compiled_layers(bench, found):
    """Each layer by itself."""

    def compile_layers(run):
        for layer in run.model.model.layers:
            layer.compile(backend=bench.sizes.compile_backend)

    compiled(bench, found, compile_layers)


def compiled_model(bench, found):
    """The whole model in one."""
    compiled(bench, found, lambda run: run.model.compile(backend=bench.sizes.compile_backend))


def compiled(bench, found, compile_it):
    """Training at a power of two that fits without, whose figures stand beside."""
    rows = bench.results.get("training", {}).get("tried", [])
    powers = [row for row in rows if "failed" not in row and math.log2(row["batch"]).is_integer()]
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    without = max(powers, key=lambda row: row["batch"], default={"batch": 1})
    run = Training(bench)
    compile_it(run)
    found["without"] = without
    found["seconds with compilation"] = run.attempt(without["batch"])["seconds of the attempt"]
    if "failed" not in run.tried[0]:
        run.attempt(without["batch"], bench.sizes.steps)
    found["compiled"] = run.tried[-1]
    found["graph breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
    found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if "failed" in found["compiled"]:
        raise RuntimeError(found["compiled"]["failed"])


class Part(NamedTuple):
    """What is run, and the seconds it needs to be begun and may take at most."""

    function: Callable
    needs: float
    at_most: float


PARTS = (
    Part(environment, 0, 60),
    Part(parity, 20, 90),
    Part(precision, 15, 60),
    Part(rates, 5, 30),
    Part(training, 30, 100),
    Part(training_checkpointed, 30, 100),
    Part(reading, 10, 60),
    Part(decoding, 20, 90),
    Part(training_without_dropout, 15, 45),
    Part(compiled_layers, 45, 150),
    Part(compiled_model, 60, 600),
)


def run_part(part, bench):
    """The part's dictionary; an error or the end of its time is written into it."""
    found, start = {}, time.perf_counter()
    if bench.end - start < part.needs:
        return {"skipped": f"it needs {part.needs} s, {max(0, bench.end - start):.0f} s were left"}
    try:
        with bench.limited_to(part.at_most):
            part.function(bench, found)
    except OutOfTime:
        found["skipped"] = f"stopped after {time.perf_counter() - start:.0f} s"
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"[:2000]
        found["where"] = traceback.format_exc(limit=-3).splitlines()[:-1][-8:]
    found["seconds"] = time.perf_counter() - start
    return found


def run_all(parts, bench, output):
    """The parts in order; the file is written after each, so that nothing done is lost."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        name = part.function.__name__
        print(f"{name} ...", flush=True)
        result = bench.results[name] = run_part(part, bench)
        bench.free()
        output.write_text(json.dumps(bench.results, indent=1) + "\n")
        wrong = [f"{key}: {result[key]}" for key in ("error", "skipped") if key in result]
        print(f"{name}: {result.get('seconds', 0):.1f} s, {(wrong or ['done'])[0]}", flush=True)
    return bench.results


def figures(results, path=()):
    """Every number of nested dictionaries with its path; the attempts of a search left out."""
    items = enumerate(results) if isinstance(results, list) else results.items()
    for key, value in items:
        if isinstance(value, (dict, list)) and key not in ("tried", "files", "where"):
            yield from figures(value, (*path, str(key)))
        elif not isinstance(value, (dict, list)):
            yield " / ".join((*path, str(key))), value


def table(results):
    """All figures in two columns."""
    rows = [(name, f"{v:.6g}" if isinstance(v, float) else str(v)) for name, v in figures(results)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def main(arguments=None):
    """Returns the exit status: 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT / "benchmarks" / "results" / "gpu_suite.json"
    parser.add_argument("--output", type=Path, default=default, metavar="FILE")
    parser.add_argument("--minutes", type=float, default=9, help="in which all of it ends")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    names = [part.function.__name__ for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART")
    args = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("highest")  # no TF32
    bench = Bench(TINY if args.tiny else FULL, args.minutes * 60 - (0 if args.tiny else RESERVE))
    parts = [part for part in PARTS if part.function.__name__ in args.parts]
    results = run_all(parts, bench, args.output)
    print(table(results))
    return int(any("error" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
