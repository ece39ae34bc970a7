"""How long OpenMP threads should spin: training speed alone and beside a busy process.

    python benchmarks/openmp.py [--steps 60] [--rounds 3] [--output benchmarks/results/openmp.json]
                                [--tiny]

Trains by the quick start's recipe with two threads and `GOMP_SPINCOUNT` of 0, 100, 1000 and 10000,
without the variable, and with one thread; each alone and beside one process that computes without
end. Every run is a process of its own. Tokens per second are those of the clock on the wall, the
steps after the first tenth; of the rounds, which go through all runs again and again, the median.
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

SPINS = ("0", "100", "1000", "10000", None)  # of two threads; None: the variable is not set
TINY = ("model.hidden_size=16", "model.head_dim=4", "model.intermediate_size=32")


def measure(steps, changes):
    """Train in this process -> tokens per second."""
    import torch  # after the environment was read
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


def measure_apart(threads, spins, steps, changes):
    """Do it in a process of its own, with so many threads that spin for so long."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment.pop("GOMP_SPINCOUNT", None)
    if spins is not None:
        environment["GOMP_SPINCOUNT"] = spins
    command = [sys.executable, __file__, "--child", json.dumps([steps, changes])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def neighbour(busy):
    """Beside what is done inside, another process computes without end, if asked for."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def main():
    if sys.argv[1:2] == ["--child"]:  # before torch is loaded
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
        return
    from tqdm import tqdm

    from melodi_hf.evaluation.command_line import (
        output_file,
        positive_int,
        print_device,
        processor,
    )

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive_int, default=60)
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--output", type=output_file, default="benchmarks/results/openmp.json")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args()
    print_device("cpu", "float32", 2)
    changes = TINY if args.tiny else ()
    cases = [(2, spins) for spins in SPINS] + [(1, None)]
    found = {(*case, busy): [] for case in cases for busy in (False, True)}
    for _ in tqdm(range(args.rounds), desc="rounds", unit="round"):
        for (threads, spins, busy), speeds in found.items():
            with neighbour(busy):
                speeds.append(measure_apart(threads, spins, args.steps, changes))
    rows = []
    for threads, spins in cases:
        alone, beside = (round(statistics.median(found[threads, spins, b])) for b in (False, True))
        row = {"threads": threads, "GOMP_SPINCOUNT": spins or "not set"}
        rows.append(row | {"alone, tokens/s": alone, "beside a busy process": beside})
    result = {"rows": rows, "steps": args.steps, "rounds": args.rounds, "cores": os.cpu_count()}
    result["machine"] = processor()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
