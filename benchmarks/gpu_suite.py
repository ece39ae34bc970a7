"""Run all GPU checks and benchmarks with one command from a plain checkout.

    python benchmarks/gpu_suite.py [--minutes 9] [--output FILE] [--parts PART ...] [--tiny]

It needs torch, transformers, safetensors and numpy; the package need not be installed. Parts are
independent: a failing part is recorded with its error and sets the exit status to 1; a part without
enough time left is recorded as skipped. If an error leaves the device unusable, or a part hangs,
the remaining parts run in a new process. `--tiny` runs everything in a minute, also on a CPU.

The parts in this order, the most important first. The modules in `gpu_parts` describe them, and
`bench.py` has all sizes:

    environment, parity, precision, rates
    training, decoding_replayed, prefill, ragged, decoding_agrees
    decoding_compiled, compiled_layers, peers, waiting, attention, latency
    decoding, training_dropout, compiled_model

At the end all numbers are printed, then those with a target.
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

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no downloads
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parts.floor import write_json  # before torch

import torch  # isort: skip

from benchmarks.gpu_parts import attention, correctness, decoding, reading, training, waiting
from benchmarks.gpu_parts.bench import FULL, TINY, Bench, OutOfTime
from melodi_hf.evaluation.command_line import output_file, positive_float, print_device

ROOT = Path(__file__).resolve().parents[1]
RESERVE = 30  # seconds reserved for imports and results
GRACE = 15  # seconds that a part may need to stop after its limit


def rates(bench, found):
    """Measure the rates of matrix products and copies."""
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
        decoding.COPY_RATE: moved / bench.median_seconds(lambda: target.copy_(source)) / 1e9,
    }


class Part(NamedTuple):
    """A function, the seconds it needs to start, and its limit in seconds."""

    function: Callable
    needs: float
    at_most: float


PARTS = (
    Part(correctness.environment, 0, 5),
    Part(correctness.parity, 10, 25),
    Part(correctness.precision, 5, 10),
    Part(rates, 2, 6),
    Part(training.training, 15, 45),
    Part(decoding.decoding_replayed, 15, 60),
    Part(reading.prefill, 10, 40),
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
    Part(training.compiled_model, 15, 300),  # limited by the remaining time
)


def run_part(part, bench):
    """Run a part; return its results, with the error or timeout if it failed."""
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
    """Run the parts in order; the results are written after each.

    begin_anew: runs the named parts in a new process that replaces this one.
    """
    for i, part in enumerate(parts):
        name = part.function.__name__
        print(f"{name} ...", flush=True)
        rest = [later.function.__name__ for later in parts[i + 1 :]]
        watch = run_with_timeout(
            part, bench, output, lambda rest=rest: begin_anew and begin_anew(rest)
        )
        result = bench.results[name] = run_part(part, bench)
        watch.cancel()
        write_json(bench.results, output)
        wrong = [f"{key}: {result[key]}" for key in ("error", "skipped") if key in result]
        failed = sum(name.endswith("failed") for name, _ in flatten_numbers(result))
        wrong += [f"{failed} failed"] if failed else []
        print(f"{name}: {result.get('seconds', 0):.1f} s, {(wrong or ['done'])[0]}", flush=True)
        if begin_anew and wrong and not device_works(bench):
            begin_anew(rest)
        bench.free()
    return bench.results


def run_with_timeout(part, bench, output, then):
    """Start a thread that takes over if a call hangs on the device."""

    def give_up():
        message = f"did not come back within {part.at_most + GRACE:.0f} s"
        bench.results[part.function.__name__] = {"error": message}
        write_json(bench.results, output)
        then()

    timer = threading.Timer(min(part.at_most, bench.end - time.perf_counter()) + GRACE, give_up)
    timer.daemon = True
    timer.start()
    return timer


def device_works(bench):
    """Tell whether the device still works; some errors make it unusable for this process."""
    try:
        return bool((torch.ones(8, device=bench.device).sum() == 8).item())
    except RuntimeError:
        return False


def flatten_numbers(results, path=()):
    """Yield every number of nested dictionaries with its path."""
    items = enumerate(results) if isinstance(results, list) else results.items()
    for key, value in items:
        if isinstance(value, (dict, list)) and key not in ("files", "where"):
            yield from flatten_numbers(value, (*path, str(key)))
        elif not isinstance(value, (dict, list)):
            yield " / ".join((*path, str(key))), value


def flatten_goals(results, path=()):
    """Yield every number with a target: path, (number, target, reached)."""
    for key, value in results.items():
        if isinstance(value, dict):
            if "reached" in value:
                yield " / ".join((*path, key)), (value["value"], value["goal"], value["reached"])
            yield from flatten_goals(value, (*path, key))


def table(results):
    """Format all numbers in two columns, then those with targets."""
    rows = [(name, format_number(value)) for name, value in flatten_numbers(results)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    lines += ["", f"{'against a goal':{width}}  {'found':>12} {'goal':>8}  reached"]
    for name, (value, goal, reached) in flatten_goals(results):
        lines.append(
            f"{name:{width}}  {format_number(value):>12} {format_number(goal):>8}  {reached}"
        )
    return "\n".join(lines)


def format_number(value):
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def restart_process(args, bench, rest):
    """Replace this process by a new one for the remaining parts, to free all memory."""
    left = max(0.01, bench.end - time.perf_counter()) / 60
    command = [sys.executable, str(Path(__file__).resolve()), "--go-on"]
    command += ["--minutes", str(left), "--output", str(args.output.resolve())]
    command += ["--tiny"] if args.tiny else []
    sys.stdout.flush()
    signal.setitimer(signal.ITIMER_REAL, 0)  # the new process would inherit it
    os.execv(sys.executable, [*command, "--parts", *(rest or ["environment"])])


def main(arguments=None):
    """Run the suite; return exit status 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT / "benchmarks" / "results" / "gpu_suite.json"
    parser.add_argument("--output", type=output_file, default=str(default), metavar="FILE")
    parser.add_argument("--minutes", type=positive_float, default=9, help="time limit")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a smoke test")
    names = [part.function.__name__ for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--go-on", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not (args.tiny or args.go_on or torch.cuda.is_available()):
        parser.error("torch finds no GPU: add --tiny for a smoke test on a CPU")
    torch.set_float32_matmul_precision("highest")  # no TF32
    reserve = 0 if args.tiny or args.go_on else RESERVE
    bench = Bench(TINY if args.tiny else FULL, args.minutes * 60 - reserve)
    print_device(bench.device, bench.sizes.matmul_dtype)
    if args.go_on:
        bench.results = json.loads(args.output.read_text())
    parts = [part for part in PARTS if part.function.__name__ in args.parts]
    results = run_all(parts, bench, args.output, lambda rest: restart_process(args, bench, rest))
    print(table(results))
    return int(any("error" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
