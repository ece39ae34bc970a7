"""Measure training speed by the spin count of OpenMP threads, with and without other load.

    python benchmarks/openmp.py [--steps 60] [--rounds 3] [--output benchmarks/results/openmp.json]
                                [--tiny]

Trains the quick start's recipe with two threads and `GOMP_SPINCOUNT` of 0, 100, 1000, 10000 and
unset, and with one thread; each alone and next to one busy process. Every run is a separate
process. Tokens per second are in wall time, without the first tenth of the steps; medians over
alternating rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]

SPINS = ("0", "100", "1000", "10000", None)  # with two threads; None: not set
TINY = ("model.hidden_size=16", "model.head_dim=4", "model.intermediate_size=32")


def measure(steps, changes):
    """Train in this process; return tokens per second."""
    import torch  # after the environment is set
    from parts.recipe import load_recipe
    from transformers import AutoModelForCausalLM

    recipe = load_recipe(ROOT / "configuration" / "quickstart.yaml", changes)
    torch.manual_seed(0)
    config = recipe.model_config(vocab_size=recipe.tokenizer.vocab_size)
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.training.learning_rate)
    shape = (recipe.training.num_rows, recipe.data.segment_length)
    ids, memory = torch.randint(config.vocab_size, shape), None
    warmup = max(1, steps // 10)
    for step in range(warmup + steps):
        if step == warmup:
            start = time.perf_counter()
        out = model(ids, labels=ids, memory=memory, return_memory=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        memory = out.memory
    return steps * ids.numel() / (time.perf_counter() - start)


def measure_in_subprocess(threads, spins, steps, changes):
    """Measure in a subprocess with a number of threads and a spin count."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment.pop("GOMP_SPINCOUNT", None)
    if spins is not None:
        environment["GOMP_SPINCOUNT"] = spins
    command = [sys.executable, __file__, "--child", json.dumps([steps, changes])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def busy_process(busy):
    """Run a busy process inside, if `busy`."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def main():
    if sys.argv[1:2] == ["--child"]:  # before torch is imported
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
        return
    from tqdm import tqdm

    from melodi_hf.evaluation.command_line import (
        output_file,
        positive_int,
        print_device,
        processor_name,
    )

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive_int, default=60)
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--output", type=output_file, default="benchmarks/results/openmp.json")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a smoke test")
    args = parser.parse_args()
    print_device("cpu", "float32", 2)
    changes = TINY if args.tiny else ()
    cases = [(2, spins) for spins in SPINS] + [(1, None)]
    found = {(*case, busy): [] for case in cases for busy in (False, True)}
    for _ in tqdm(range(args.rounds), desc="rounds", unit="round"):
        for (threads, spins, busy), speeds in found.items():
            with busy_process(busy):
                speeds.append(measure_in_subprocess(threads, spins, args.steps, changes))
    rows = []
    for threads, spins in cases:
        alone, loaded = (round(statistics.median(found[threads, spins, b])) for b in (False, True))
        row = {"threads": threads, "GOMP_SPINCOUNT": spins or "not set"}
        rows.append(row | {"alone, tokens/s": alone, "beside a busy process": loaded})
    result = {"rows": rows, "steps": args.steps, "rounds": args.rounds, "cores": os.cpu_count()}
    result["machine"] = processor_name()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
