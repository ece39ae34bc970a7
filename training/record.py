"""The folder of a run: what must be true of it before, and what is told of the run afterwards.

    python training/record.py runs/quickstart

puts what is kept of a finished run where the tables of README and cards are made from.
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
except ImportError:  # on Windows, where folders cannot be held
    fcntl = None  # type: ignore[assignment]

import torch
from parts.recipe import Recipe, is_on_hub
from transformers import AutoModelForCausalLM

from melodi_hf.checkpoints import checkpoints, last_whole_checkpoint, refuse_other_processes
from melodi_hf.evaluation.command_line import (
    FAILURES,
    one_line,
    output_folder,
    processor,
    read_object,
)
from melodi_hf.evaluation.tables import evaluation_table, position_table

RECIPE, RESULTS = "recipe.json", "results.json"
MAY_CHANGE = {"evaluation", "expect"}  # the sections that a resumed run may have otherwise
SPARE_BYTES = 64 * 2**20  # tokenizer, plots and results
OPTIMIZER_COPIES = {"adamw": 2, "adafactor": 1}  # of all parameters


def is_finished(output: Path) -> bool:
    return (output / RESULTS).is_file()


def check_output(output: Path, recipe: Recipe, resume: bool) -> None:
    """Refuse a folder that cannot be written to, or that holds a run that would be lost."""
    output_folder(str(output))
    output.mkdir(parents=True, exist_ok=True)
    if resume:
        check_same_recipe(output, recipe)
    elif is_finished(output):
        raise ValueError(
            f"{output} holds a finished run, which is kept: choose another folder by --output DIR, "
            "or remove this one"
        )
    elif any(output.glob("checkpoint-*")):
        raise ValueError(
            f"{output} holds a run that was stopped: go on with it by --resume, "
            "or choose another folder by --output DIR"
        )


def check_same_recipe(output: Path, recipe: Recipe) -> None:
    """Refuse to go on by another recipe than the one the run began with."""
    if not (output / RECIPE).is_file():
        return
    before = flatten(json.loads((output / RECIPE).read_text(encoding="utf-8")))
    now = flatten(json.loads(json.dumps(recipe.as_dict())))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key.split(".")[0] not in MAY_CHANGE:
            raise ValueError(
                f"{output} was begun with {key}={before.get(key)}, not {now.get(key)}: "
                "resume it as it was, or choose another folder by --output DIR"
            )


def flatten(recipe: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name}.{key}": x for name, part in recipe.items() for key, x in part.items()}


def choose_checkpoint(output: Path) -> Path | None:
    """Where to go on: the last whole checkpoint, or None, the beginning. Tells which, and why."""
    if is_finished(output):
        return None
    checkpoint, flaws = last_whole_checkpoint(output)
    if checkpoint is not None:
        refuse_other_processes(checkpoint, int(os.environ.get("WORLD_SIZE", "1")))
    if is_first_process():
        for passed_over, flaw in flaws.items():
            print(f"{passed_over} is passed over: {flaw}")
        where = checkpoint or f"the beginning: {output} holds no whole checkpoint"
        print(f"going on from {where}")
    return checkpoint


def hold(output: Path) -> ExitStack:
    """Keep the folder from being written to by two runs at once, until what is returned is closed.

    The system lets go of it when the process ends, however that happens. The processes of a
    torchrun that is killed outlive it, which nobody would see.
    """
    held = ExitStack()
    if fcntl is not None and is_first_process():
        folder = os.open(output, os.O_RDONLY)
        held.callback(os.close, folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            held.close()
            raise ValueError(
                f"{output} is being written to by another process, perhaps of a run that was "
                "stopped only in part: end it, or choose another folder by --output DIR"
            ) from error
    return held


def remove_checkpoints(output: Path) -> None:
    """Once the results are written, nothing goes on from them."""
    if not is_first_process():
        return
    for checkpoint in checkpoints(output):
        shutil.rmtree(checkpoint)


def check_disk(output: Path, needed: int) -> None:
    """Refuse to begin what the disk could not hold in the end."""
    free = shutil.disk_usage(output).free
    if free < needed:
        raise ValueError(
            f"{output} needs {needed:,} bytes for checkpoints, and its disk has {free:,} left: "
            "free some, or choose a folder on another disk by --output DIR"
        )


def needed_bytes(recipe: Recipe, vocab_size: int) -> int:
    """The model, and two checkpoints: the next is written before the last one is removed."""
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
    """All of it or nothing: a run that is stopped here leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def environment() -> dict[str, Any]:
    """What the numbers of a run may depend on besides its recipe."""
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
    """The commit that the code stands at, with a mark if files were changed since."""
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
    return f"{processor()}, {torch.get_num_threads()} threads"


def of_record(results: dict[str, Any]) -> dict[str, Any]:
    """Results without the folders of one machine and without a passage of the documents."""
    recipe = json.loads(json.dumps(results["recipe"]))
    data, tokenizer = recipe["data"], recipe["tokenizer"]
    for key in ("files", "validation_files", "test_files"):
        data[key] = [Path(name).name for name in data.get(key, ())]
    if tokenizer["path"] and not is_on_hub(tokenizer["path"]):
        tokenizer["path"] = Path(tokenizer["path"]).name
    passage = {name: x for name, x in (results["continuation"] or {}).items() if name != "read"}
    return {**results, "recipe": recipe, "continuation": passage or None}


def keep(run: Path, cards: Path) -> Path:
    """Write a run's results of record, and its plot beside them."""
    results = read_object(run / RESULTS, "name", "recipe", "evaluation", "continuation")
    name = results["name"]
    figures = cards / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "perplexity_by_position.svg", figures / f"{name}_by_position.svg")
    (cards / "results").mkdir(exist_ok=True)
    kept = cards / "results" / f"{name}.json"
    write_json(kept, of_record(results))
    return kept


def is_first_process() -> bool:
    """Of those that torchrun started, the one that writes files."""
    return os.environ.get("RANK", "0") == "0"


def peak_memory_gb() -> float | None:
    """The most that was held at once: of the GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if os.name != "posix":
        return None
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def report(recipe: Recipe, results: dict[str, Any], output: Path) -> None:
    """What a reader wants to know first."""
    evaluation, passage = results["evaluation"], results["continuation"]
    print(f"\n{evaluation_table(evaluation)}\n\n{position_table(evaluation)}\n")
    if passage is not None:
        print(f"After {passage['tokens_read']:,} tokens, which end in")
        print(textwrap.indent(passage["read"], "  | "), "the model goes on", sep="\n")
        print(textwrap.indent(passage["written"], "  > "), end="\n\n")
    found, expected = evaluation["settings"]["carried"]["perplexity_per_token"], recipe.expect
    print(f"{results['minutes']:.1f} minutes, test perplexity {found:.2f}", end="")
    if expected.perplexity is not None and expected.spread is not None:
        reached = abs(found - expected.perplexity) <= expected.spread
        print(f", {'' if reached else 'NOT '}as expected", end="")
        print(f" ({expected.perplexity} ± {expected.spread})", end="")
    print(f"\n{output} holds the model with its tokenizer and card, {RESULTS} and the plots")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Keep the results of a finished run.")
    parser.add_argument("run", type=Path, help="the folder that training/train.py left")
    run = parser.parse_args(arguments).run
    try:
        if not is_finished(run):
            raise ValueError(
                f"{run} holds no {RESULTS}: name the folder of a run of training/train.py that has "
                "ended; one that was stopped goes on by --resume"
            )
        print(keep(run, Path(__file__).resolve().parents[1] / "model_cards"))
    except FAILURES as error:
        sys.exit(f"record.py: {one_line(error)}")


if __name__ == "__main__":
    main()
