"""Manage the folder of a run: checks before it starts, results and report at its end.

    python training/record.py runs/quickstart

copies the results of a finished run to model_cards/, from which README and cards are generated.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows, where folders cannot be locked
    fcntl = None  # type: ignore[assignment]

import torch
from parts.recipe import Recipe, is_on_hub
from transformers import AutoModelForCausalLM

from melodi_hf.checkpoints import check_num_processes, last_complete_checkpoint, list_checkpoints
from melodi_hf.evaluation.command_line import (
    FAILURES,
    one_line,
    output_folder,
    processor_name,
    read_object,
)
from melodi_hf.evaluation.tables import evaluation_table, position_table

RECIPE, RESULTS = "recipe.json", "results.json"
CHANGEABLE_SECTIONS = {"evaluation", "expect"}  # sections that may differ in a resumed run
SPARE_BYTES = 64 * 2**20  # tokenizer, plots and results
OPTIMIZER_COPIES = {"adamw": 2, "adafactor": 1}  # copies of all parameters


def is_finished(output: Path) -> bool:
    return (output / RESULTS).is_file()


def check_output(output: Path, recipe: Recipe, resume: bool) -> None:
    """Check that the folder is writable and contains no run that would be overwritten."""
    output_folder(str(output))
    output.mkdir(parents=True, exist_ok=True)
    if resume:
        check_same_recipe(output, recipe)
    elif is_finished(output):
        raise ValueError(
            f"{output} contains a finished run: choose another folder by --output DIR, "
            "or delete this one"
        )
    elif any(output.glob("checkpoint-*")):
        raise ValueError(
            f"{output} contains an interrupted run: add --resume, "
            "or choose another folder by --output DIR"
        )


def check_same_recipe(output: Path, recipe: Recipe) -> None:
    """Check that a resumed run has the recipe that it was started with."""
    if not (output / RECIPE).is_file():
        return
    before = flatten(json.loads((output / RECIPE).read_text(encoding="utf-8")))
    now = flatten(json.loads(json.dumps(recipe.as_dict())))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key.split(".")[0] not in CHANGEABLE_SECTIONS:
            raise ValueError(
                f"{output} was started with {key}={before.get(key)}, not {now.get(key)}: "
                "resume with the same recipe, or choose another folder by --output DIR"
            )


def flatten(recipe: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name}.{key}": x for name, part in recipe.items() for key, x in part.items()}


def choose_checkpoint(output: Path) -> Path | None:
    """Return the last complete checkpoint, or None to start from scratch; print which, and why."""
    if is_finished(output):
        return None
    checkpoint, reasons = last_complete_checkpoint(output)
    if checkpoint is not None:
        check_num_processes(checkpoint, int(os.environ.get("WORLD_SIZE", "1")))
    if is_first_process():
        for skipped, reason in reasons.items():
            print(f"skipping {skipped}: {reason}")
        where = checkpoint or f"the beginning: {output} has no complete checkpoint"
        print(f"resuming from {where}")
    return checkpoint


def lock_output(output: Path) -> ExitStack:
    """Lock the folder against a second run, until the returned stack is closed.

    The system releases the lock when the process ends. The worker processes of a killed torchrun
    may survive it and still write to the folder.
    """
    lock = ExitStack()
    if fcntl is not None and is_first_process():
        folder = os.open(output, os.O_RDONLY)
        lock.callback(os.close, folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise ValueError(
                f"{output} is in use by another process, perhaps a worker of a killed run: end "
                "that process, or choose another folder by --output DIR"
            ) from error
    return lock


def remove_checkpoints(output: Path) -> None:
    """Remove all checkpoints, which a finished run does not need."""
    if not is_first_process():
        return
    for checkpoint in list_checkpoints(output):
        shutil.rmtree(checkpoint)


def check_disk(output: Path, needed: int) -> None:
    """Check that the disk has room for the checkpoints."""
    free = shutil.disk_usage(output).free
    if free < needed:
        raise ValueError(
            f"{output} needs {needed:,} bytes for checkpoints, but its disk has {free:,} free: "
            "free some space, or choose a folder on another disk by --output DIR"
        )


def needed_bytes(recipe: Recipe, vocab_size: int) -> int:
    """Estimate the bytes of the model and two checkpoints.

    A checkpoint is removed only after the next one is saved.
    """
    config = recipe.model_config(
        **({} if "vocab_size" in recipe.model else {"vocab_size": vocab_size})
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = 4 * model.num_parameters()
    rows = recipe.training.num_rows * recipe.training.gradient_accumulation_steps
    memory = 4 * config.memory_floats() * rows
    checkpoint = weights * (1 + OPTIMIZER_COPIES[recipe.training.optimizer]) + memory
    return weights + 2 * checkpoint + SPARE_BYTES


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def environment() -> dict[str, Any]:
    """Return versions, hardware and commit, on which results may depend besides the recipe."""
    packages = ("torch", "transformers", "accelerate", "tokenizers", "numpy")
    return {
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "hardware": hardware(),
    }


def commit() -> str | None:
    """Return the current commit, with a mark for uncommitted changes."""
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty",
    ]
    try:
        return subprocess.run(git, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def without_local_details(results: dict[str, Any]) -> dict[str, Any]:
    """Remove local paths and quoted text from results."""
    recipe = json.loads(json.dumps(results["recipe"]))
    data, tokenizer = recipe["data"], recipe["tokenizer"]
    for key in ("files", "validation_files", "test_files"):
        data[key] = [Path(name).name for name in data.get(key, ())]
    if tokenizer["path"] and not is_on_hub(tokenizer["path"]):
        tokenizer["path"] = Path(tokenizer["path"]).name
    passage = {name: x for name, x in (results["continuation"] or {}).items() if name != "read"}
    return {**results, "recipe": recipe, "continuation": passage or None}


def record_run(run: Path, cards: Path) -> Path:
    """Copy the results and the plot of a run to model_cards/."""
    results = read_object(run / RESULTS, "name", "recipe", "evaluation", "continuation")
    name = results["name"]
    figure_folder = cards / "figures"
    figure_folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "perplexity_by_position.svg", figure_folder / f"{name}_by_position.svg")
    (cards / "results").mkdir(exist_ok=True)
    path = cards / "results" / f"{name}.json"
    write_json(path, without_local_details(results))
    return path


def is_first_process() -> bool:
    """Tell whether this is the process of rank 0, which writes the files."""
    return os.environ.get("RANK", "0") == "0"


def peak_memory_gb() -> float | None:
    """Return the peak memory of the GPU, or of the process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if os.name != "posix":
        return None
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def report(recipe: Recipe, results: dict[str, Any], output: Path) -> None:
    """Print a summary of the run."""
    evaluation, passage = results["evaluation"], results["continuation"]
    print(f"\n{evaluation_table(evaluation)}\n\n{position_table(evaluation)}\n")
    if passage is not None:
        print(f"After {passage['tokens_read']:,} tokens, ending in")
        print(textwrap.indent(passage["read"], "  | "), "the model continues", sep="\n")
        print(textwrap.indent(passage["written"], "  > "), end="\n\n")
    found, expected = evaluation["settings"]["carried"]["perplexity_per_token"], recipe.expect
    print(f"{results['minutes']:.1f} minutes, test perplexity {found:.2f}", end="")
    if expected.perplexity is not None and expected.spread is not None:
        reached = abs(found - expected.perplexity) <= expected.spread
        print(f", {'' if reached else 'NOT '}as expected", end="")
        print(f" ({expected.perplexity} ± {expected.spread})", end="")
    print(f"\n{output} contains model, tokenizer, card, {RESULTS} and plots")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Record the results of a finished run.")
    parser.add_argument("run", type=Path, help="output folder of training/train.py")
    run = parser.parse_args(arguments).run
    try:
        if not is_finished(run):
            raise ValueError(
                f"{run} has no {RESULTS}: pass the folder of a finished run of training/train.py; "
                "resume an interrupted run by --resume"
            )
        print(record_run(run, Path(__file__).resolve().parents[1] / "model_cards"))
    except FAILURES as error:
        sys.exit(f"record.py: {one_line(error)}")


if __name__ == "__main__":
    main()
