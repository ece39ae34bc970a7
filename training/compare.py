"""Train all rows of a table on the same tokens, with the same optimiser, budget and seeds.

    python training/compare.py configuration/comparison.yaml --seeds 0 1 2 --jobs 2 \\
        --set data.files=[books_train.jsonl.gz,math_train.jsonl.gz,docs_train.jsonl.gz] \\
        --test books=books_test.jsonl.gz math=math_test.jsonl.gz documents=docs_test.jsonl.gz
    python training/compare.py configuration/comparison.yaml --speed

Rows that are not comparable raise an error before any run starts (`parts/fairness.py`). Each run is
a separate process of `train.py`. A failed run does not stop the others. The same command run again
skips finished runs and resumes interrupted ones. Several commands may share one folder if their
rows differ.

Results are written to model_cards/results/<table>/<row>-<seed>.json, from which
`python -m melodi_hf.evaluation.tables` makes the tables. `--speed` measures the speed of all rows.
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
from parts.excerpts import TOKENIZER, TRAIN, ExcerptRequest, prepare_excerpts
from parts.fairness import check_fair
from parts.recipe import Recipe, check_files, list_recipes, load_recipe, split_name
from record import RESULTS, check_output, is_finished, without_local_details, write_json
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
LOG = "log.txt"  # in the folder of a run
POLL_SECONDS = 0.2  # seconds


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
        output = [
            "--output",
            str(self.output),
            "--resume",
        ]  # starts from scratch without a checkpoint
        return [sys.executable, str(TRAIN_SCRIPT), self.recipe, *changes, *output]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train all rows of a table and record the results."
    )
    parser.add_argument("table", type=Path, help="for example configuration/comparison.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change all rows"
    )
    parser.add_argument("--test", nargs="+", default=[], metavar="NAME=FILE", help="test documents")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--seeds", nargs="+", type=seed_number, default=[0], metavar="N")
    parser.add_argument("--jobs", type=positive_int, default=1, metavar="N", help="parallel runs")
    parser.add_argument("--output", type=output_folder, metavar="DIR", help="default: runs/<table>")
    parser.add_argument(
        "--record", type=output_folder, metavar="DIR", help="folder of the JSON results"
    )
    parser.add_argument(
        "--characters",
        type=positive_int,
        default=16_000,
        metavar="N",
        help="characters read from each document",
    )
    parser.add_argument(
        "--limit", type=positive_int, default=30, metavar="N", help="test documents per name"
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
        recipes = load_rows(options)
        check_fair(recipes)
        chosen = choose_rows(options.rows, recipes)
        if options.speed:
            records = options.record or ROOT / "benchmarks" / "results"
            file = output_file(str(records / f"{options.table.stem}.json"))
            print_device("cpu", "float32")
            measured = measure_speed({row: recipes[row] for row in chosen}, options.rounds)
            write_json(file, measured)
            print(measurements_table(measured["rows"]))
            return
        output = options.output or Path("runs") / options.table.stem
        results = ROOT / "model_cards" / "results"
        records = output_folder(str(options.record or results / options.table.stem))
        excerpts, runs = prepare_runs(options, chosen, recipes, output.resolve())
    except FAILURES as error:
        parser.error(one_line(error))
    threads = int(os.environ.get("OMP_NUM_THREADS", 1))  # the default of `start`
    print_device(device, next(iter(recipes.values())).training.precision, threads)
    failed = run_all(runs, options.jobs, records, excerpts)
    if failed:
        sys.exit(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(map(str, failed))}")


def load_rows(options: argparse.Namespace) -> dict[str, Recipe]:
    """Load the recipe of every row, including rows that are not run now."""
    names = list_recipes(options.table)
    return {split_name(name)[1]: load_recipe(name, options.set) for name in names}


def choose_rows(asked: Sequence[str] | None, recipes: dict[str, Recipe]) -> list[str]:
    for row in asked or ():
        if row not in recipes:
            raise ValueError(f"there is no row {row!r}: choose from {', '.join(recipes)}")
    return list(asked or recipes)


def prepare_runs(
    options: argparse.Namespace, rows: Sequence[str], recipes: dict[str, Recipe], output: Path
) -> tuple[dict[str, Any], list[Run]]:
    """Prepare the excerpts and the runs; raise if one of the runs could not start."""
    first = next(iter(recipes.values()))
    tests = parse_tests(options.test)
    check_files(replace(first, data=replace(first.data, test_files=tuple(tests.values()))))
    asked = ExcerptRequest(
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
    for seed in options.seeds:  # finish all rows of a seed before the next seed
        for row in rows:
            changes = (*shared, f"training.seed={seed}")
            recipe = f"{options.table}:{row}"
            runs.append(Run(row, seed, recipe, changes, output / f"{row}-{seed}"))
            check_output(runs[-1].output, load_recipe(recipe, changes), resume=True)
    return excerpts, runs


def parse_tests(given: Sequence[str]) -> dict[str, str]:
    tests = {}
    for each in given:
        name, equals, path = each.partition("=")
        if not (equals and name.isidentifier()) or name in tests or name == "train":
            raise ValueError(
                f"--test {each}: write NAME=FILE with unique names, for example books=FILE"
            )
        tests[name] = path
    if not tests:
        raise ValueError(
            "--test is missing: pass the test documents, for example --test books=FILE"
        )
    return tests


def run_all(runs: Sequence[Run], jobs: int, records: Path, excerpts: dict[str, Any]) -> list[Run]:
    """Run up to `jobs` runs in parallel, print a line for each, and return the failed ones."""
    waiting, failed = [run for run in runs if not is_finished(run.output)], []
    for run in runs:
        if run not in waiting:
            print(f"{run}: already finished; {record_run(run, records, excerpts)}")
    running: dict[Run, subprocess.Popen] = {}
    with (
        tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run") as bar,
        terminate_on_exit(running),
    ):
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = start(run)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                if running.pop(run).returncode == 0:
                    outcome = record_run(run, records, excerpts)
                else:
                    failed.append(run)
                    outcome = f"FAILED, see {run.output / LOG}: {last_line(run.output / LOG)}"
                bar.write(f"{run}: {outcome}")
                bar.update()
            time.sleep(POLL_SECONDS)
    return failed


def start(run: Run) -> subprocess.Popen:
    """Start a run as a process with one thread, so that each core can take one run."""
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    with (run.output / LOG).open("a", encoding="utf-8") as log:
        return subprocess.Popen(run.command(), stdout=log, stderr=log, env=environment)


@contextmanager
def terminate_on_exit(running: dict[Run, subprocess.Popen]) -> Iterator[None]:
    """Terminate the runs when this process ends; they can be resumed."""
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
    """Return the last line of a log; progress bars overwrite theirs."""
    lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8").strip())
    return lines[-1] or "the log is empty"


def record_run(run: Run, records: Path, excerpts: dict[str, Any]) -> str:
    """Write the results of a finished run to the records; return a summary line."""
    results = json.loads((run.output / RESULTS).read_text(encoding="utf-8"))
    write_json(
        records / f"{run.row}-{run.seed}.json",
        without_local_details(results) | {"excerpts": excerpts},
    )
    reached = results["evaluation"]["settings"]["carried"]["perplexity_per_token"]
    return f"{results['minutes']:.1f} minutes, test perplexity {reached:.2f}"


if __name__ == "__main__":
    main()
