"""Everything that wants a GPU, in one command from a bare checkout: is it right, and how fast?

    python benchmarks/gpu_suite.py [--minutes 9] [--output FILE] [--parts PART ...] [--tiny]

It needs torch, transformers, safetensors and numpy; the package need not be installed. Every part
stands alone: one that fails is recorded with its error and makes the exit status 1, one for which
no time is left is recorded as skipped. If an error leaves the device unusable, or a part does not
come back in its time, a new process goes on with the parts that follow. `--tiny` runs everything
in a minute, on a CPU too.

The parts, in this order, the most telling ones first; the modules in `gpu_parts` say what each of
them measures, and `bench.py` how large everything is:

    environment, parity, precision, schedules, rates
    training, decoding_replayed, prefill, training_schedules, ragged, decoding_agrees
    decoding_compiled, compiled_layers, peers, waiting, attention, latency
    decoding, training_dropout, compiled_model

Printed last are all figures, and below them those that have a goal.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is to be looked up
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts.floor import write  # before torch

import torch  # isort: skip

from benchmarks.gpu_parts import attention, correctness, decoding, reading, training, waiting
from benchmarks.gpu_parts.bench import FULL, TINY, Bench, OutOfTime
from melodi_hf.evaluation.command_line import output_file, positive_float, print_device

ROOT = Path(__file__).resolve().parents[1]
RESERVE = 30  # seconds of the limit, for imports and for writing the results
GRACE = 15  # seconds after its time that a part may need to stop


def rates(bench, found):
    """Medians after a warm-up, on random data."""
    size, dtype, products = bench.sizes.matmul_size, bench.sizes.matmul_dtype, 10
    a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def multiply():
        for _ in range(products):
            torch.mm(a, b, out=out)

    source = torch.ones(bench.sizes.copied_bytes // 4, device=bench.device)
    target, moved = torch.empty_like(source), 2 * bench.sizes.copied_bytes
    flops = 2 * size**3 * products
    found |= {
        "matmul": f"{size} cubed, {str(dtype).removeprefix('torch.')}",
        "matmul TFLOP/s": flops / bench.median_seconds(multiply) / 1e12,
        decoding.COPIES: moved / bench.median_seconds(lambda: target.copy_(source)) / 1e9,
    }


class Part(NamedTuple):
    """What is run, and the seconds it needs to be begun and may take at most."""

    function: Callable
    needs: float
    at_most: float


PARTS = (
    Part(correctness.environment, 0, 5),
    Part(correctness.parity, 10, 25),
    Part(correctness.precision, 5, 10),
    Part(correctness.schedules, 5, 10),
    Part(rates, 2, 6),
    Part(training.training, 15, 45),
    Part(decoding.decoding_replayed, 15, 60),
    Part(reading.prefill, 10, 40),
    Part(training.training_schedules, 5, 15),
    Part(correctness.ragged, 5, 15),
    Part(decoding.decoding_agrees, 10, 30),
    Part(decoding.decoding_compiled, 15, 60),
    Part(training.compiled_layers, 15, 50),
    Part(reading.peers, 10, 45),
    Part(waiting.waiting, 3, 6),
    Part(attention.attention, 10, 40),
    Part(reading.latency, 3, 8),
    Part(decoding.decoding, 5, 12),
    Part(training.training_dropout, 5, 12),
    Part(training.compiled_model, 15, 300),  # at most what the others left
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


def run_all(parts, bench, output, begin_anew=None):
    """The parts in order; the file is written after each, so that nothing done is lost.

    begin_anew: given the names of parts, goes on with them in a new process in place of this one.
    """
    for i, part in enumerate(parts):
        name = part.function.__name__
        print(f"{name} ...", flush=True)
        rest = [later.function.__name__ for later in parts[i + 1 :]]
        watch = watched(part, bench, output, lambda rest=rest: begin_anew and begin_anew(rest))
        result = bench.results[name] = run_part(part, bench)
        watch.cancel()
        write(bench.results, output)
        wrong = [f"{key}: {result[key]}" for key in ("error", "skipped") if key in result]
        failed = sum(name.endswith("failed") for name, _ in figures(result))
        wrong += [f"{failed} failed"] if failed else []
        print(f"{name}: {result.get('seconds', 0):.1f} s, {(wrong or ['done'])[0]}", flush=True)
        if begin_anew and wrong and not still_works(bench):
            begin_anew(rest)
        bench.free()
    return bench.results


def watched(part, bench, output, then):
    """Python cannot interrupt a call that waits for a device that hangs: a thread takes over."""

    def give_up():
        told = f"did not come back within {part.at_most + GRACE:.0f} s"
        bench.results[part.function.__name__] = {"error": told}
        write(bench.results, output)
        then()

    timer = threading.Timer(min(part.at_most, bench.end - time.perf_counter()) + GRACE, give_up)
    timer.daemon = True
    timer.start()
    return timer


def still_works(bench):
    """Whether the device computes: some errors leave it unusable for this process."""
    try:
        return bool((torch.ones(8, device=bench.device).sum() == 8).item())
    except RuntimeError:
        return False


def figures(results, path=()):
    """Every number of nested dictionaries with its path."""
    items = enumerate(results) if isinstance(results, list) else results.items()
    for key, value in items:
        if isinstance(value, (dict, list)) and key not in ("files", "where"):
            yield from figures(value, (*path, str(key)))
        elif not isinstance(value, (dict, list)):
            yield " / ".join((*path, str(key))), value


def goals(results, path=()):
    """Every figure that has a goal: its path -> itself, the goal, and whether it was reached."""
    for key, value in results.items():
        if isinstance(value, dict):
            if "reached" in value:
                yield " / ".join((*path, key)), (value["value"], value["goal"], value["reached"])
            yield from goals(value, (*path, key))


def table(results):
    """All figures in two columns, then those with goals."""
    rows = [(name, shown(value)) for name, value in figures(results)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    lines += ["", f"{'against a goal':{width}}  {'found':>12} {'goal':>8}  reached"]
    for name, (value, goal, reached) in goals(results):
        lines.append(f"{name:{width}}  {shown(value):>12} {shown(goal):>8}  {reached}")
    return "\n".join(lines)


def shown(value):
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def go_on(args, bench, rest):
    """In a new process in place of this one, which gives back all that it held."""
    left = max(0.01, bench.end - time.perf_counter()) / 60
    command = [sys.executable, str(Path(__file__).resolve()), "--go-on"]
    command += ["--minutes", str(left), "--output", str(args.output.resolve())]
    command += ["--tiny"] if args.tiny else []
    sys.stdout.flush()
    signal.setitimer(signal.ITIMER_REAL, 0)  # a new process would inherit it
    os.execv(sys.executable, [*command, "--parts", *(rest or ["environment"])])


def main(arguments=None):
    """Returns the exit status: 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT / "benchmarks" / "results" / "gpu_suite.json"
    parser.add_argument("--output", type=output_file, default=str(default), metavar="FILE")
    parser.add_argument("--minutes", type=positive_float, default=9, help="in which all of it ends")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    names = [part.function.__name__ for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--go-on", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not (args.tiny or args.go_on or torch.cuda.is_available()):
        parser.error("torch finds no GPU: add --tiny to see on a CPU that everything runs")
    torch.set_float32_matmul_precision("highest")  # no TF32
    reserve = 0 if args.tiny or args.go_on else RESERVE
    bench = Bench(TINY if args.tiny else FULL, args.minutes * 60 - reserve)
    print_device(bench.device, bench.sizes.matmul_dtype)
    if args.go_on:
        bench.results = json.loads(args.output.read_text())
    parts = [part for part in PARTS if part.function.__name__ in args.parts]
    results = run_all(parts, bench, args.output, lambda rest: go_on(args, bench, rest))
    print(table(results))
    return int(any("error" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
