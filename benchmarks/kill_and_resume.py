"""Kill training processes, resume them, and compare with uninterrupted runs.

    python benchmarks/kill_and_resume.py [--seed 0] [--output FILE]

Each tiny recipe is run once without interruption, and once with repeated SIGKILLs: after random
times, and at selected events at random steps. These must be bit-equal: the weights, every logged
loss, score, rate and gradient norm, and all of results.json except times. Takes some minutes.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from melodi_hf.checkpoints import checkpoint_step, last_complete_checkpoint
from melodi_hf.evaluation.command_line import non_negative_int, output_file, print_device

ROOT = Path(__file__).resolve().parents[1]
STEPS = 60
PROGRESS_BAR = re.compile(r"[\r\n]\s*\d+%\|[^|]*\| (\d+)/(\d+) \[")  # without a description
TIMES = re.compile("minutes|second|runtime|peak_memory|resumed|train_loss")  # may differ
SECONDS = 600  # timeout for the end of a process, or for the event at which it is killed
RECIPE = {
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.head_dim": 8,
    "model.intermediate_size": 32,
    "model.window_length": 8,
    "model.num_summary_tokens": 4,
    "model.num_short_memory_tokens": 4,
    "model.long_memory_layers": [1],
    "model.num_long_memory_tokens": 2,
    "model.long_memory_windows": 4,
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
    "data.source": "files",
    "data.segment_length": 16,
    "tokenizer.vocab_size": 300,
    "training.steps": STEPS,
    "training.num_rows": 2,
    "training.warmup_steps": 5,
    "evaluation.segment_windows": 2,
    "evaluation.num_rows": 2,
    "evaluation.read_tokens": 40,
    "evaluation.new_tokens": 4,
}


class Scenario(NamedTuple):
    """A recipe, the number of processes, and the events at which they are killed."""

    recipe: dict[str, Any]
    num_processes: int
    moments: tuple[str, ...]


SCENARIOS = {
    "AdamW, cosine, two micro-batches": Scenario(
        {
            "training.optimizer": "adamw",
            "training.schedule": "cosine",
            "training.gradient_accumulation_steps": 2,
            "training.log_every": 3,
            "training.save_every": 4,
            "training.evaluate_every": 6,
        },
        1,
        ("time", "optimizer.pt", "evaluation", "time", "whole.json.unfinished", "time", "card"),
    ),
    "Adafactor, schedule of the paper": Scenario(
        {
            "training.optimizer": "adafactor",
            "training.schedule": "paper",
            "training.log_every": 1,
            "training.save_every": 5,
            "training.evaluate_every": 5,
        },
        1,
        ("model.safetensors", "time", "evaluation", "time", "whole.json", "time", "last scores"),
    ),
    "AdamW, linear, two processes": Scenario(
        {
            "training.optimizer": "adamw",
            "training.schedule": "linear",
            "training.log_every": 4,
            "training.save_every": 5,
            "training.evaluate_every": 7,
        },
        2,
        ("time", "memory_1.safetensors", "one of two", "evaluation", "time", "last model"),
    ),
}


class TrainingProcess:
    """A running training process."""

    def __init__(self, command, run, log):
        self.start, self.run, self.path = time.time(), run, log
        self.logged = None  # metrics logged up to the last checkpoint
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment()
            )

    @property
    def log(self):
        return self.path.read_text(encoding="utf-8", errors="replace")

    def wrote(self, path):
        """Tell whether this process has written the file."""
        try:
            return path.stat().st_mtime >= self.start
        except FileNotFoundError:
            return False

    def bars(self):
        """Return the states (done, total) of the bars of training and validation."""
        return [(int(done), int(total)) for done, total in PROGRESS_BAR.findall(self.log)]

    def is_training(self):
        return any(total == STEPS for _, total in self.bars())

    def is_evaluating(self):
        """Tell whether a validation is running."""
        bars = self.bars()
        return bool(bars) and bars[-1][1] != STEPS and bars[-1][0] < bars[-1][1]

    def wait(self, until=lambda: False):
        """Wait for a condition; return False if the process ended before."""
        while time.time() < self.start + SECONDS:
            self.logged = self.logged or read_logged(self.run)
            if until():
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        self.kill()
        raise TimeoutError(f"{self.path} timed out:\n{self.log[-2000:]}")

    def kill(self, only_last=False):
        """Kill every process of the run, or the last rank only."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        family = [self.process.pid, *(child.pid for child in children)]
        for pid in family[-1:] if only_last else family:
            with suppress(ProcessLookupError):  # it has already ended
                os.kill(pid, signal.SIGKILL)
        self.process.wait(SECONDS)
        psutil.wait_procs(children, SECONDS)


def environment():
    """Return an environment with one thread, no network, and this checkout."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def write_texts(folder):
    """Write reproducible random documents of several lengths."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(60)]
    for name, lengths in {
        "files": range(100, 900, 80),
        "validation_files": range(60, 300, 60),
        "test_files": range(60, 300, 60),
    }.items():
        texts = [" ".join(draw.choices(words, k=length)) for length in lengths]
        lines = [json.dumps({"id": f"{name} {i}", "text": text}) for i, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def make_command(scenario, folder, run, resume=False):
    """Return the command line of a run."""
    files = {f"data.{path.stem}": path for path in folder.glob("*.jsonl")}
    keys = {**RECIPE, **files, **scenario.recipe}
    launch = [sys.executable]
    if scenario.num_processes > 1:
        processes = f"--nproc-per-node={scenario.num_processes}"
        launch += ["-m", "torch.distributed.run", "--standalone", processes]
    recipe = [ROOT / "training" / "train.py", ROOT / "configuration" / "quickstart.yaml"]
    changes = [f"--set={key}={value}" for key, value in keys.items()]
    return [*launch, *recipe, *changes, "--output", run, *(["--resume"] if resume else [])]


def read_logged(run):
    """Read the metrics logged up to the last step; None if they are not available."""
    last = run / f"checkpoint-{STEPS}"
    try:
        if (last / "whole.json").is_file():
            return json.loads((last / "trainer_state.json").read_text())["log_history"]
    except FileNotFoundError:
        pass
    return None


def collect_results(life, logged):
    """Wait for the end and return everything that must be equal."""
    life.wait()
    if life.process.returncode:
        raise RuntimeError(f"{life.path} failed:\n{life.log[-3000:]}")
    results = json.loads((life.run / "results.json").read_text())
    logged = logged or life.logged
    assert logged, "the last checkpoint was not seen"
    files = {
        name: (life.run / name).read_bytes() for name in ("model.safetensors", "tokenizer.json")
    }
    return {
        "logged": without_times(logged),
        "results": without_times(results),
        **files,
    }


def without_times(value):
    """Remove times and memory from results."""
    if isinstance(value, dict):
        return {key: without_times(x) for key, x in value.items() if not TIMES.search(key)}
    return [without_times(x) for x in value] if isinstance(value, list) else value


def kill_condition(kind, life, draw, scenario, seconds):
    """Return a condition at which to kill the process, and its description."""
    run = life.run
    at_files = {"last model": run / "model.safetensors", "card": run / "README.md"}
    if kind in ("time", "one of two"):
        began, delay = [], draw.uniform(0, seconds)

        def is_over():
            if not began and life.is_training():
                began.append(time.time())
            over = life.wrote(run / "model.safetensors")  # faster than the timed run
            return bool(began) and (over or time.time() >= began[0] + delay)

        return is_over, f"{delay:.2f} s into training"
    if kind == "evaluation":
        return life.is_evaluating, "while validation documents are scored"
    if kind == "last scores":
        scoring = re.compile(r"carried: +\d+%")
        return lambda: scoring.search(life.log), "while test documents are scored"
    if kind in at_files:
        return lambda: life.wrote(at_files[kind]), f"once {at_files[kind].name} is there at the end"
    before, _ = last_complete_checkpoint(run)
    every, count = scenario.recipe["training.save_every"], draw.randint(1, 3)
    step = min((checkpoint_step(before) if before else 0) + every * count, STEPS)
    path = run / f"checkpoint-{step}" / kind
    return lambda: life.wrote(path), f"once {path.parent.name}/{kind} is there"


def checkpoint_state(run):
    """Return the checkpoint to resume from, and newer incomplete ones."""
    if (run / "results.json").is_file():  # only the checkpoints remain to be removed
        return {"half written": None, "goes on from step": None}
    left, passed_over = last_complete_checkpoint(run)
    return {
        "half written": ", ".join(path.name for path in passed_over) or None,
        "goes on from step": checkpoint_step(left) if left else 0,
    }


def kill_until_finished(name, folder, draw, tell):
    """Run a scenario; return a row per kill, with the checkpoint to resume from."""
    scenario = SCENARIOS[name]
    whole = TrainingProcess(
        make_command(scenario, folder, folder / "whole"), folder / "whole", folder / "whole.log"
    )
    whole.wait(whole.is_training)
    start = time.time()
    whole.wait(lambda: whole.wrote(folder / "whole" / "model.safetensors"))
    seconds = (time.time() - start) / len(scenario.moments)
    expected = collect_results(whole, None)

    rows, run, logged = [], folder / "killed", None
    for number, kind in enumerate(scenario.moments):
        command = make_command(scenario, folder, run, resume=number > 0)
        life = TrainingProcess(command, run, folder / f"life_{number}.log")
        come, moment = kill_condition(kind, life, draw, scenario, seconds)
        if not life.wait(come):
            raise RuntimeError(f"{life.path} ended before it was killed:\n{life.log[-3000:]}")
        life.kill(only_last=kind == "one of two")
        logged = logged or life.logged
        rows.append(
            {
                "run": name,
                "killed": moment + (", one process alone" if kind == "one of two" else ""),
                **checkpoint_state(run),
            }
        )
        tell(rows[-1])
    life = TrainingProcess(
        make_command(scenario, folder, run, resume=True), run, folder / "last_life.log"
    )
    found = collect_results(life, logged)
    other = [key for key in expected if found[key] != expected[key]]
    return [{**row, "bit-equal": "no: " + ", ".join(other) if other else "yes"} for row in rows]


def run_scenario(name, seed, bar):
    """Run a scenario in a temporary folder; return its rows."""

    def tell(row):
        bar.update()
        bar.write(json.dumps(row))

    with tempfile.TemporaryDirectory() as folder:
        write_texts(Path(folder))
        return kill_until_finished(name, Path(folder), random.Random(f"{seed} {name}"), tell)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of the kill times")
    parser.add_argument(
        "--output",
        type=output_file,
        default=str(ROOT / "benchmarks/results/kill_and_resume.json"),
    )
    args = parser.parse_args(arguments)
    print_device("cpu", "float32")
    kills = sum(len(scenario.moments) for scenario in SCENARIOS.values())
    with tqdm(total=kills, desc="kills", unit="kill") as bar, ThreadPoolExecutor() as pool:
        work = [pool.submit(run_scenario, name, args.seed, bar) for name in SCENARIOS]
        rows = [row for done in work for row in done.result()]
    result = {"rows": rows, "seed": args.seed, "steps of each run": STEPS}
    result |= {"torch": torch.__version__, "transformers": transformers.__version__}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{sum(row['bit-equal'] == 'yes' for row in rows)} of {len(rows)} runs are bit-equal")
    return rows


if __name__ == "__main__":
    main()
