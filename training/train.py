"""Train a model from a recipe, evaluate it, and save a folder for `from_pretrained`.

    python training/train.py configuration/quickstart.yaml
    python training/train.py configuration/quickstart.yaml --set training.seed=1 --output runs/1
    python training/train.py configuration/quickstart.yaml --set training.steps=5 --train-only

The folder (runs/<recipe>, or --output) contains model, tokenizer, card, `results.json` and plots.
With --train-only it contains the model and the last checkpoint; the same command with --resume
instead of --train-only evaluates it.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import parts.threads  # noqa: F401  # before torch

# isort: split

import torch
from parts.documents import check_documents, prepare, train_own_tokenizer
from parts.recipe import Recipe, check_files, load_recipe, run_name, without_expectation
from record import (
    RECIPE,
    RESULTS,
    check_disk,
    check_output,
    choose_checkpoint,
    environment,
    is_finished,
    is_first_process,
    lock_output,
    needed_bytes,
    peak_memory_gb,
    remove_checkpoints,
    report,
    write_json,
)
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments, set_seed
from transformers.utils import is_torch_xla_available
from transformers.utils.logging import disable_progress_bar

from melodi_hf.data.segments import Segments
from melodi_hf.data.tokens import EncodedDocument, load_tokenizer
from melodi_hf.evaluation.cards import write_card
from melodi_hf.evaluation.command_line import (
    FAILURES,
    choose_device,
    one_line,
    print_device,
    require_packages,
)
from melodi_hf.evaluation.continuation import read_and_continue
from melodi_hf.evaluation.loading import load
from melodi_hf.evaluation.perplexity import evaluate_perplexity
from melodi_hf.evaluation.plots import plot_by_position, plot_loss
from melodi_hf.tracking import trackers
from melodi_hf.trainer import PAPER_ADAFACTOR, MemoryTrainer, paper_schedule

if is_torch_xla_available():
    from melodi_hf import tpu

QUOTED_TOKENS = 200  # of the prompt, quoted before the continuation


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train and evaluate a model from a recipe.")
    parser.add_argument("recipe", help="recipe.yaml, or table.yaml:row")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a key of the recipe",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/<recipe>")
    parser.add_argument(
        "--resume", action="store_true", help="resume from the last complete checkpoint"
    )
    parser.add_argument(
        "--train-only", action="store_true", help="skip the evaluation and the continuation"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    name = run_name(options.recipe)
    output = options.output or Path("runs") / name
    try:
        require_packages("train", "accelerate", "matplotlib")
        device = choose_device()
        recipe = load_recipe(options.recipe, options.set)
        recipe = without_expectation(recipe, options.set)
        check_files(recipe)
        check_output(output, recipe, options.resume)
        path = recipe.tokenizer.path
        tokenizer = load(load_tokenizer, path, "tokenizer") if path else None
        vocab_size = len(tokenizer) if tokenizer else recipe.tokenizer.vocab_size
        check_disk(output, needed_bytes(recipe, vocab_size))
        checkpoint = choose_checkpoint(output) if options.resume else None
        lock = lock_output(output)
    except FAILURES as error:
        parser.error(one_line(error))
    with lock:
        if is_finished(output):
            print(f"{output / RESULTS} exists: the run is finished, nothing to resume")
            remove_checkpoints(output)
        else:
            print_device(device, recipe.training.precision)
            run(recipe, name, output, tokenizer, checkpoint, options.train_only)


def run(
    recipe: Recipe,
    name: str,
    output: Path,
    tokenizer: Any,
    checkpoint: Path | None,
    train_only: bool = False,
) -> None:
    """Train from scratch or from a checkpoint, evaluate, and write model and card."""
    start = time.perf_counter()
    disable_progress_bar()  # of saving only
    set_seed(recipe.training.seed)

    try:  # documents and datasets are read here first
        tokenizer = tokenizer or train_own_tokenizer(recipe)
        if is_first_process():
            write_json(output / RECIPE, recipe.as_dict())
            tokenizer.save_pretrained(output)
        train_data, validation_data, test_data = prepare(recipe, tokenizer)
        check_documents(output, train_data, is_resumed=checkpoint is not None)
    except FAILURES as error:
        sys.exit(f"train.py: {one_line(error)}")

    model = AutoModelForCausalLM.from_config(
        recipe.model_config(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    print(
        f"{model.num_parameters():,} parameters, {model.config.memory_floats():,} floats of memory"
    )
    trainer = make_trainer(recipe, output, model, train_data, validation_data)
    trainer.train(resume_from_checkpoint=checkpoint)
    model = trainer.whole_model()
    if model is None:  # rank 0 does the rest
        return
    model.eval()  # no dropout in the continuation
    model.save_pretrained(output)
    if train_only:
        print(f"{output} contains the model and its last checkpoint; --resume evaluates it")
        return

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluation = evaluate_perplexity(
        model,
        test_data,
        start_id=tokenizer.eos_token_id,
        segment_windows=recipe.evaluation.segment_windows,
        num_rows=recipe.evaluation.num_rows,
    )
    fed = trainer.train_dataset
    assert isinstance(fed, Segments)
    results = {
        "name": name,
        "recipe": recipe.as_dict(),
        **environment(),
        "world_size": trainer.args.world_size,
        "seed": recipe.training.seed,
        "data": {
            "train": train_data.as_dict(),
            "test": test_data.as_dict(),
            "order": fed.digest(trainer.state.global_step * fed.num_rows),
        },
        "parameters": model.num_parameters(),
        "memory_floats": model.config.memory_floats(),
        "resumed": checkpoint is not None,
        "training": {
            "updates": trainer.state.global_step,
            "tokens": trainer.state.num_input_tokens_seen,
            "history": [history_entry(entry) for entry in logs],
        },
        "tokens_per_second": statistics.median(e["tokens_per_second"] for e in logs),
        "evaluation": evaluation,
        "continuation": continuation(recipe, model, tokenizer, test_data),
        "minutes": (time.perf_counter() - start) / 60,
        "peak_memory_gb": peak_memory_gb(),
    }
    plot_loss(results["training"]["history"], output / "loss")
    plot_by_position(evaluation, output / "perplexity_by_position")
    write_card(output, results)
    write_json(output / RESULTS, results)
    remove_checkpoints(output)
    report(recipe, results, output)


def make_trainer(
    recipe: Recipe,
    output: Path,
    model: PreTrainedModel,
    data: Sequence[EncodedDocument],
    validation_data: Sequence[EncodedDocument] | None = None,
) -> MemoryTrainer:
    """Make the Trainer, with as many epochs of the documents as the steps need."""
    asked, on_tpu = recipe.training, is_torch_xla_available()
    rows = asked.num_rows * (tpu.devices_per_process() if on_tpu else 1)
    # The precision comes from the recipe, not from accelerate's configuration file.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    arguments = TrainingArguments(
        output_dir=str(output),
        run_name=output.name,
        project="melodi_hf",
        max_steps=asked.steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=asked.gradient_accumulation_steps,
        learning_rate=asked.learning_rate,
        lr_scheduler_type="constant" if asked.schedule == "paper" else asked.schedule,
        warmup_steps=asked.warmup_steps,
        weight_decay=asked.weight_decay,
        max_grad_norm=asked.max_grad_norm,
        bf16=asked.precision == "bfloat16",
        seed=asked.seed,
        logging_steps=asked.log_every,
        logging_nan_inf_filter=False,  # a NaN or infinite loss stops the run
        save_steps=asked.save_every,
        save_total_limit=1,
        eval_strategy="steps" if validation_data else "no",
        eval_steps=asked.evaluate_every or None,
        include_num_input_tokens_seen="all",
        train_sampling_strategy="sequential",
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",  # callbacks are added below
        # Required for several processes on CPUs.
        use_cpu=not (torch.accelerator.is_available() or on_tpu),
        **(tpu.training_arguments() if on_tpu else {}),
    )
    # The name since transformers 5.23, and before.
    new, old = "activation_checkpointing", "gradient_checkpointing"
    setattr(arguments, new if hasattr(arguments, new) else old, asked.gradient_checkpointing)
    segments: dict[str, Any] = {
        "segment_length": recipe.data.segment_length,
        "num_rows": rows * arguments.world_size * asked.gradient_accumulation_steps,
        "start_id": model.config.eos_token_id,
        "pad_id": model.config.pad_token_id,
        "seed": asked.seed,
        "vocab_size": model.config.vocab_size,
    }
    epoch = Segments(data, **segments).num_steps
    # One more than needed, since the rows of an epoch have different lengths.
    train_dataset = Segments(data, **segments, num_epochs=math.ceil(asked.steps / epoch) + 1)
    segments |= {"num_rows": rows * arguments.world_size, "seed": None}  # to evaluate on
    return (tpu.TpuTrainer if on_tpu else MemoryTrainer)(
        model,
        arguments,
        train_dataset=train_dataset,
        eval_dataset=Segments(validation_data, **segments) if validation_data else None,
        callbacks=trackers(output / "logs"),
        optimizer_cls_and_kwargs=paper_optimizer(recipe),
        schedule=paper_learning_rate(recipe),
    )


def paper_optimizer(recipe: Recipe) -> tuple[type, dict[str, Any]] | None:
    if recipe.training.optimizer != "adafactor":
        return None
    optimizer, options = PAPER_ADAFACTOR
    return optimizer, {**options, "lr": recipe.training.learning_rate}


def paper_learning_rate(recipe: Recipe):
    """Return the paper's schedule with the recipe's peak and warm-up, if the recipe asks for it."""
    if recipe.training.schedule != "paper":
        return None
    peak, warmup = recipe.training.learning_rate, recipe.training.warmup_steps
    return lambda step, total: paper_schedule(step, total, peak, peak / 10, warmup)


def history_entry(logged: dict[str, Any]) -> dict[str, Any]:
    names = {
        "step": "step",
        "num_input_tokens_seen": "tokens",
        "loss": "loss",
        "learning_rate": "learning_rate",
    }
    return {ours: logged[theirs] for theirs, ours in names.items()}


def continuation(
    recipe: Recipe, model: PreTrainedModel, tokenizer: Any, test_data: Sequence[EncodedDocument]
) -> dict[str, Any] | None:
    """Read `read_tokens` of the test documents, the longest first, and generate a continuation."""
    asked = recipe.evaluation
    if not asked.read_tokens:
        return None
    longest_first = sorted(test_data, key=lambda document: -len(document.ids))
    start = tokenizer.eos_token_id
    ids = [x for document in longest_first for x in (start, *document.ids.tolist())]
    ids = ids[: asked.read_tokens]
    set_seed(recipe.training.seed)
    new_ids, metrics = read_and_continue(model, ids, asked.new_tokens, do_sample=True, top_p=0.9)
    quoted = tokenizer.decode(ids[-QUOTED_TOKENS:], skip_special_tokens=True)
    return {
        **metrics,
        "read": quoted,
        "written": tokenizer.decode(new_ids, skip_special_tokens=True),
    }


if __name__ == "__main__":
    main()
