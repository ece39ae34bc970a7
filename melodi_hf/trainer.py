"""The Trainer whose rows carry their memory from step to step.

Row `b` of every batch reads the segments of its documents in order. What a step leaves in the
memory of a row, without gradient, the next step finds there, except where `reset_memory` says that
another document begins:

    step         0              1              2
    row 0   [ A, segment 0 | A, segment 1 | B, segment 0 ]
                       memory ->       empty

That holds only while batches come in the order of the data set, so other orders are refused.
Evaluation reads its own documents, from an empty memory, and leaves that of training as it was.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import Adafactor, ProgressCallback, Trainer

from melodi_hf.data.segments import Segments

# The rule of the released code. Paper: the class below keeps the second moment of every matrix in
# factored form; the released code does so only where both of its sides are 128 or more.
PAPER_ADAFACTOR = (
    Adafactor,
    {
        "eps": (1e-30, 1e-3),
        "clip_threshold": 1.0,
        "decay_rate": -0.8,
        "beta1": 0.9,
        "weight_decay": 0.0,
        "scale_parameter": True,
        "relative_step": False,
        "warmup_init": False,
    },
)


def paper_schedule(step, total_steps, peak=0.01, floor=0.001, warmup=1000):
    """The learning rate of the paper: up in a line, down along a cosine that began with the line,
    and beyond the last step half as much for every `total_steps`."""
    if step >= total_steps:
        return 2 * floor * 0.5 ** (step / total_steps)
    way = min(max(step, warmup), total_steps) / total_steps
    cosine = floor + (peak - floor) * (1 + math.cos(math.pi * way)) / 2
    return cosine * (min(step, warmup) / warmup if warmup else 1.0)


class MemoryTrainer(Trainer):
    """A Trainer for models that take `memory` and return it, on data sets such as `Segments`.

    schedule: the learning rate at `(step, total_steps)`, in place of `args.lr_scheduler_type`.
    """

    def __init__(self, *args, schedule: Callable[[int, int], float] | None = None, **kwargs):
        self.schedule = schedule
        super().__init__(*args, **kwargs)
        refuse_torn_rows(self)
        self.label_names = ["shift_labels"]
        self.model_accepts_loss_kwargs = True
        self._memory: dict[str, Any] = {"training": None, "evaluation": None}
        self._scores: list[torch.Tensor] = []  # of an evaluation: summed losses, targets
        self._clock: Any = None  # at the last figures: seconds, tokens read
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(FiguresOnBar)

    def train(self, *args, **kwargs):
        self._memory["training"], self._clock = None, None
        return super().train(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        if self._clock is None:
            self._clock = (time.perf_counter(), self.state.num_input_tokens_seen)
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "training" if model.training else "evaluation"
        memory = {"memory": self._memory[mode], "return_memory": True, "use_cache": False}
        loss, outputs = super().compute_loss(
            model, {**inputs, **memory}, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        self._memory[mode] = outputs.memory
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """Each target counts once, over all micro-batches and devices of a step."""
        batches = [{**batch, "labels": batch["shift_labels"]} for batch in batch_samples]
        return super()._get_num_items_in_batch(batches, device)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, _, _ = super().prediction_step(model, inputs, True, list(ignore_keys or ()))
        assert loss is not None
        targets = self._get_num_items_in_batch([inputs], loss.device)
        self._scores.append(torch.stack((loss.double() * targets, targets.double())))
        return loss, None, None

    def evaluation_loop(self, *args, **kwargs):
        start = time.perf_counter()
        self._memory["evaluation"] = None
        self._scores.clear()
        output = super().evaluation_loop(*args, **kwargs)
        self._memory["evaluation"] = None
        # The Trainer's mean is over batches; this one is over targets, as in training.
        nll, targets = self.accelerator.reduce(torch.stack(self._scores).sum(0), "mean").tolist()
        loss_name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        metrics = {**(output.metrics or {}), loss_name: nll / targets}
        if self._clock is not None:
            self._clock = (self._clock[0] + time.perf_counter() - start, self._clock[1])
        return output._replace(metrics=metrics)

    def create_scheduler(self, num_training_steps, *args, **kwargs):
        if self.schedule is not None and self.lr_scheduler is None:
            peak, schedule = self.args.learning_rate, self.schedule
            assert self.optimizer is not None
            self.lr_scheduler = LambdaLR(
                self.optimizer, lambda step: schedule(step, num_training_steps) / peak
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def get_decay_parameter_names(self, model):
        """Matrices decay; what scales or shifts single channels does not."""
        return [name for name, weight in model.named_parameters() if weight.ndim > 1]

    def log(self, logs, *args, **kwargs):
        for name in ("loss", "eval_loss"):
            if name in logs:
                logs[name.replace("loss", "perplexity")] = perplexity(logs[name], self.state)
        if "loss" in logs:
            (before, read), now = self._clock, time.perf_counter()
            tokens = self.state.num_input_tokens_seen
            logs["tokens_per_second"] = (tokens - read) / (now - before)
            self._clock = (now, tokens)
        super().log(logs, *args, **kwargs)

    # The Trainer calls these two on every rank, the second where training goes on.

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self._memory["training"] is not None:
            save_memory(self._memory["training"], self._memory_file(output_dir))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        model = self.accelerator.unwrap_model(self.model)
        empty = model.base_model.empty_memory(self.args.per_device_train_batch_size)
        self._memory["training"] = load_memory(
            empty, self._memory_file(checkpoint), self.args.device
        )

    def _memory_file(self, checkpoint):
        return Path(checkpoint) / f"memory_{self.args.process_index}.safetensors"


class FiguresOnBar(ProgressCallback):
    """The progress bar, with the figures beside it instead of lines between."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in (logs or {}):
            loss, speed = f"{logs['loss']:.3f}", f"{logs['tokens_per_second']:,.0f}"
            self.training_bar.set_postfix({"loss": loss, "tokens/s": speed})


def perplexity(loss, state):
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} at step {state.global_step}: "
            "try a lower learning rate, a longer warm-up, or float32"
        )
    return math.exp(min(loss, 700.0))


def refuse_torn_rows(trainer):
    """Refuse whatever would give a row the memory of another, or train on what it does not say."""
    args = trainer.args
    if args.n_gpu > 1:
        raise ValueError(
            f"one process drives {args.n_gpu} GPUs (nn.DataParallel), which would tear rows from "
            "their memories: start one process for each by "
            f"torchrun --nproc-per-node={args.n_gpu}, or show it one GPU by CUDA_VISIBLE_DEVICES=0"
        )
    wanted = {
        "train_sampling_strategy": "sequential",
        "dataloader_drop_last": True,
        "auto_find_batch_size": False,
        "label_smoothing_factor": 0.0,
    }
    for name, value in wanted.items():
        if getattr(args, name) != value:
            raise ValueError(
                f"{name} is {getattr(args, name)!r}: memories are carried along the rows of a data "
                f"set that is read in order, step by step; give {name}={value!r}"
            )
    sizes = (args.train_batch_size, args.eval_batch_size)
    for dataset, size in zip((trainer.train_dataset, trainer.eval_dataset), sizes, strict=True):
        rows = size * args.world_size
        if isinstance(dataset, Segments) and dataset.num_rows != rows:
            raise ValueError(
                f"the data set has num_rows={dataset.num_rows}, but a batch over all devices has "
                f"{rows} ({size} on each of {args.world_size}): the two must be equal"
            )


def save_memory(memory, path):
    """Write the tensors of a memory, and its plain numbers beside them, into one file."""
    leaves, _ = tree_flatten(memory)
    tensors = {str(i): x.cpu().contiguous() for i, x in enumerate(leaves) if torch.is_tensor(x)}
    numbers = {str(i): x for i, x in enumerate(leaves) if not torch.is_tensor(x)}
    save_file({name: x.clone() for name, x in tensors.items()}, path, {"json": json.dumps(numbers)})


def load_memory(empty, path, device):
    """Read a memory back into the shape of an empty one, which it must fit."""
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: the checkpoint is damaged, or was written by another number of "
            "processes; go on with as many, or from another checkpoint"
        )
    leaves, structure = tree_flatten(empty)
    with safe_open(path, "pt", device=str(device)) as file:
        found = json.loads(file.metadata()["json"])
        found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    shapes = [tuple(x.shape) if torch.is_tensor(x) else () for x in leaves]
    loaded = [found.get(str(i)) for i in range(len(leaves))]
    if len(found) != len(leaves) or shapes != [tuple(getattr(x, "shape", ())) for x in loaded]:
        raise ValueError(f"the memory in {path} is that of another model or number of rows")
    return tree_unflatten(loaded, structure)
