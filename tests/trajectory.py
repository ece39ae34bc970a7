"""One training run, done in several ways that must not differ.

test_trajectory.py starts this file in two processes, where it goes all ways that need them:

    torchrun --nproc-per-node 2 -m tests.trajectory DIR together
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import TrainingArguments

from melodi_hf.data.segments import Segments
from melodi_hf.trainer import PAPER_ADAFACTOR, MemoryTrainer

from .fsdp_on_processors import pretend_that_processors_are_devices
from .models import VOCABULARY, WINDOW, build

STEPS, LANES, SEGMENT = 6, 4, 2 * WINDOW
PAPER = PAPER_ADAFACTOR[0], {**PAPER_ADAFACTOR[1], "lr": 0.01}

# Each has four rows: in one batch, in micro-batches, on two devices.
SCORED = {"eval_strategy": "steps", "eval_steps": 3}
# transformers renamed the argument; the old name is deprecated.
NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTED = {next(n for n in NAMES if n in TrainingArguments.__dataclass_fields__): True}
MICRO_BATCHES = {"rows": 1, "gradient_accumulation_steps": 2}
ALONE = {
    "scored": SCORED,
    "not scored": {},
    "accumulation": {"rows": 2, "gradient_accumulation_steps": 2},
    "accumulation of single rows": {"rows": 1, "gradient_accumulation_steps": 4},
    "checkpointing": CHECKPOINTED,
}
TOGETHER = {
    "two processes": {"rows": 2},
    "two processes, accumulation, scored": MICRO_BATCHES | SCORED,
    "two processes, checkpointing": {"rows": 2, **CHECKPOINTED},
    "FSDP2": {"rows": 2, "fsdp": True},
    "FSDP2, accumulation, scored": MICRO_BATCHES | SCORED | {"fsdp": True},
    "FSDP2, checkpointing": {"rows": 2, "fsdp": True, **CHECKPOINTED},
}
# The optimiser of the paper, and a system whose queue no one has to shard.
OTHERS = {
    "paper": {"optimizer": PAPER, "max_grad_norm": 0.0},
    "without queue": {"changes": {"long_memory_layers": ()}},
    "another system": {"name": "transformer_xl"},
    "another loss": {"name": "compressive_transformer"},
}


def segments(seed, rows):
    """Of documents that end anywhere in a segment: no two steps have as many targets."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(5, 6 * SEGMENT, 14)
    documents = [generator.integers(1, VOCABULARY, length) for length in lengths]
    return Segments(documents, segment_length=SEGMENT, num_rows=rows, start_id=1, pad_id=0)


def make_trainer(folder, rows=LANES, name="melodi", changes=None, optimizer=None, **given):
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": rows,
            "per_device_eval_batch_size": rows * given.get("gradient_accumulation_steps", 1),
            "learning_rate": 3e-3,
            "max_grad_norm": 0.5,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "train_sampling_strategy": "sequential",
            "dataloader_drop_last": True,
            "dataloader_pin_memory": False,
            "include_num_input_tokens_seen": "all",
            "disable_tqdm": True,
            "use_cpu": True,
            "report_to": "none",
            **given,
        }
    )
    return MemoryTrainer(
        build(name, **changes or {}),
        arguments,
        train_dataset=segments(0, LANES),
        eval_dataset=segments(1, LANES),
        optimizer_cls_and_kwargs=optimizer,
    )


def train(folder, **given):
    """What the run logged at each step, and in evaluation."""
    trainer = make_trainer(folder, **given)
    trainer.train()
    return trainer.state.log_history


def main(folder, ways):
    pretend_that_processors_are_devices()
    torch.set_num_threads(1)
    found = {}
    for way, given in ways.items():
        os.environ["ACCELERATE_USE_FSDP"] = str(given.get("fsdp", False)).lower()
        found[way] = train(folder, **given)
    if os.environ["RANK"] == "0":
        (folder / "found.json").write_text(json.dumps(found))


def on_two_devices(others):
    return {
        f"{way}, {how}": {"rows": 2, "fsdp": how == "FSDP2", **given}
        for way, given in others.items()
        for how in ("DDP", "FSDP2")
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), {"together": TOGETHER, "others": on_two_devices(OTHERS)}[sys.argv[2]])
