"""Run all rows of a table on the same tokens, with the same optimiser and budget, seed by seed.

    python training/compare.py configuration/comparison.yaml --seeds 0 1 2 --jobs 2 \\
        --set data.files=[books_train.jsonl.gz,math_train.jsonl.gz,docs_train.jsonl.gz] \\
        --test books=books_test.jsonl.gz math=math_test.jsonl.gz documents=docs_test.jsonl.gz
    python training/compare.py configuration/comparison.yaml --speed

A comparison that is not fair is refused before any of it is run (`fairness`). Each run is one of
`train.py`, in a process of its own: one that fails does not end the others, finished ones are
skipped, and those that were stopped go on, all by the same command again. Several commands may work
in one folder, on rows of their own.

What is kept of a run goes to model_cards/results/<table>/<row>-<seed>.json, from which
`python -m melodi_hf.evaluation.tables` makes the table. `--speed` measures all rows side by side.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import parts.threads  # noqa: F401  # before torch

# isort: split

from parts.compare_speed import measure_speed
from parts.excerpts import TOKENIZER, TRAIN, Asked, prepare_excerpts
from parts.fairness import check_fair
from parts.recipe import Recipe, check_files, load_recipe, recipes_of, split_name
from record import RESULTS, check_output, is_finished, of_record, write_json
from tqdm import tqdm

from melodi_hf.evaluation.command_line import (
    FAILURES,
    choose_device,
    one_line,
    output_file,
    output_folder,
    positive_int,
    print_device,
    require_packages,
    seed_number,
)
from melodi_hf.evaluation.tables import measurements_table

ROOT = Path(__file__).resolve().parents[1]
TRAIN_SCRIPT = Path(__file__).with_name("train.py")
LOG = "log.txt"  # of a run, in its folder
POLL = 0.2  # seconds


class Run(NamedTuple):
    """One row with one seed."""

    row: str
    seed: int
    recipe: str  # table.yaml:row
    changes: tuple[str, ...]  # as for --set
    output: Path

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"

    def command(self) -> list[str]:
        changes = [f"--set={change}" for change in self.changes]
        output = ["--output", str(self.output), "--resume"]  # from the beginning if none is there
        return [sys.executable, str(TRAIN_SCRIPT), self.recipe, *changes, *output]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Run all rows of a table, and keep what comes.")
    parser.add_argument("table", type=Path, help="such as configuration/comparison.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change all rows"
    )
    parser.add_argument("--test", nargs="+", default=[], metavar="NAME=FILE", help="what is scored")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--seeds", nargs="+", type=seed_number, default=[0], metavar="N")
    parser.add_argument("--jobs", type=positive_int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--output", type=output_folder, metavar="DIR", help="default: runs/<table>")
    parser.add_argument(
        "--record", type=output_folder, metavar="DIR", help="where the JSON is kept"
    )
    parser.add_argument(
        "--characters", type=positive_int, default=16_000, metavar="N", help="read of each document"
    )
    parser.add_argument(
        "--limit", type=positive_int, default=30, metavar="N", help="test documents of each name"
    )
    parser.add_argument("--speed", action="store_true", help="measure tokens per second instead")
    parser.add_argument("--rounds", type=positive_int, default=7, metavar="N", help="of --speed")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        require_packages("train", "accelerate", "matplotlib")
        device = choose_device()
        recipes = rows_of(options)
        check_fair(recipes)
        chosen = choose(options.rows, recipes)
        if options.speed:
            kept = options.record or ROOT / "benchmarks" / "results"
            file = output_file(str(kept / f"{options.table.stem}.json"))
            print_device("cpu", "float32")
            measured = measure_speed({row: recipes[row] for row in chosen}, options.rounds)
            write_json(file, measured)
            print(measurements_table(measured["rows"]))
            return
        output = options.output or Path("runs") / options.table.stem
        results = ROOT / "model_cards" / "results"
        kept = output_folder(str(options.record or results / options.table.stem))
        excerpts, runs = prepare_runs(options, chosen, recipes, output.resolve())
    except FAILURES as error:
        parser.error(one_line(error))
    threads = int(os.environ.get("OMP_NUM_THREADS", 1))  # as `start` sets it
    print_device(device, next(iter(recipes.values())).training.precision, threads)
    failed = run_all(runs, options.jobs, kept, excerpts)
    if failed:
        sys.exit(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(map(str, failed))}")


def rows_of(options: argparse.Namespace) -> dict[str, Recipe]:
    """The recipe of every row, also of those that are not run now: all must be comparable."""
    names = recipes_of(options.table)
    return {split_name(name)[1]: load_recipe(name, options.set) for name in names}


def choose(asked: Sequence[str] | None, recipes: dict[str, Recipe]) -> list[str]:
    for row in asked or ():
        if row not in recipes:
            raise ValueError(f"there is no row {row!r}: the table has {', '.join(recipes)}")
    return list(asked or recipes)


def prepare_runs(
    options: argparse.Namespace, rows: Sequence[str], recipes: dict[str, Recipe], output: Path
) -> tuple[dict[str, Any], list[Run]]:
    """The excerpts that all runs read, and the runs; refused if one of them could not begin."""
    first = next(iter(recipes.values()))
    tests = tests_of(options.test)
    check_files(replace(first, data=replace(first.data, test_files=tuple(tests.values()))))
    asked = Asked(
        first.data.files,
        tests,
        options.characters,
        options.limit,
        first.tokenizer.path,
        first.tokenizer.vocab_size,
    )
    excerpts = prepare_excerpts(output / "excerpts", asked)
    folder = output / "excerpts"
    names = ", ".join(str(folder / f"{name}.jsonl") for name in tests)
    tokenizer = first.tokenizer.path or folder / TOKENIZER
    shared = [
        *options.set,
        f"data.files=[{folder / TRAIN}]",
        f"data.test_files=[{names}]",
        f"tokenizer.path={tokenizer}",
    ]
    runs = []
    for seed in options.seeds:  # all rows of one seed come before the next
        for row in rows:
            changes = (*shared, f"training.seed={seed}")
            recipe = f"{options.table}:{row}"
            runs.append(Run(row, seed, recipe, changes, output / f"{row}-{seed}"))
            check_output(runs[-1].output, load_recipe(recipe, changes), resume=True)
    return excerpts, runs


def tests_of(given: Sequence[str]) -> dict[str, str]:
    tests = {}
    for each in given:
        name, equals, path = each.partition("=")
        if not (equals and name.isidentifier()) or name in tests or name == "train":
            raise ValueError(f"--test {each}: write NAME=FILE, each name once, such as books=FILE")
        tests[name] = path
    if not tests:
        raise ValueError("--test is missing: name what is scored, such as --test books=FILE")
    return tests


def run_all(runs: Sequence[Run], jobs: int, kept: Path, excerpts: dict[str, Any]) -> list[Run]:
    """Run them, so many at a time; those that failed. A line tells of each."""
    waiting, failed = [run for run in runs if not is_finished(run.output)], []
    for run in runs:
        if run not in waiting:
            print(f"{run}: finished before; {keep(run, kept, excerpts)}")
    running: dict[Run, subprocess.Popen] = {}
    with tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run") as bar, ended(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = start(run)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                if running.pop(run).returncode == 0:
                    told = keep(run, kept, excerpts)
                else:
                    failed.append(run)
                    told = f"FAILED, see {run.output / LOG}: {last_line(run.output / LOG)}"
                bar.write(f"{run}: {told}")
                bar.update()
            time.sleep(POLL)
    return failed


def start(run: Run) -> subprocess.Popen:
    """In a process of its own, with one thread: as many runs as cores can go side by side."""
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    with (run.output / LOG).open("a", encoding="utf-8") as log:
        return subprocess.Popen(run.command(), stdout=log, stderr=log, env=environment)


@contextmanager
def ended(running: dict[Run, subprocess.Popen]) -> Iterator[None]:
    """Whatever ends this process ends its runs too; they go on another time."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)


def last_line(log: Path) -> str:
    """What a run said last; bars of progress write their lines over and over."""
    lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8").strip())
    return lines[-1] or "nothing was written"


def keep(run: Run, kept: Path, excerpts: dict[str, Any]) -> str:
    """Write what is kept of a finished run; a line about it."""
    results = json.loads((run.output / RESULTS).read_text(encoding="utf-8"))
    write_json(kept / f"{run.row}-{run.seed}.json", of_record(results) | {"excerpts": excerpts})
    reached = results["evaluation"]["settings"]["carried"]["perplexity_per_token"]
    return f"{results['minutes']:.1f} minutes, test perplexity {reached:.2f}"


if __name__ == "__main__":
    main()
