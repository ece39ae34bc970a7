"""A Trainer that carries the memory of each row from step to step.

Row `b` of every batch reads the segments of its documents in order. The memory of a row, detached,
is passed on to the next step, unless `reset_memory` marks the start of another document:

    step         0              1              2
    row 0   [ A, segment 0 | A, segment 1 | B, segment 0 ]
                       memory ->       empty

A step has the rows of all devices and of all micro-batches of gradient accumulation. Each
micro-batch has its own rows and memory. With two devices, two micro-batches and one row in each,
item `step * 4 + row` of the data set is read by

    row             0    1    2    3
    micro-batch     0    0    1    1
    device          0    1    0    1

so that loss and gradients equal those of one batch of four rows. Batches must be read in the order
of the data set; other settings raise an error. Evaluation starts from an empty memory and does not
change that of training.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import AutoModelForCausalLM, ProgressCallback, Trainer

from melodi_hf.adafactor import OPTIONS, PaperAdafactor
from melodi_hf.checkpoints import (
    check_num_processes,
    incomplete_reason,
    last_complete_checkpoint,
    mark_complete,
    remove_old_checkpoints,
)
from melodi_hf.data.segments import IGNORED, Segments
from melodi_hf.models.configuration_decoder import DecoderConfig
from melodi_hf.models.loss import mask_targets_before_first_token, shift_targets
from melodi_hf.models.memory_file import unwrap_decoder
from melodi_hf.tracking import memory_metrics

PAPER_ADAFACTOR = PaperAdafactor, OPTIONS
LABELS = ("shift_labels", "labels")  # the first of these that a batch has is used


def paper_schedule(step, total_steps, peak=0.01, floor=0.001, warmup=1000):
    """Compute the learning rate of the paper: linear warm-up and cosine decay.

    The cosine starts at step 0. After `total_steps` the rate is halved every `total_steps`.
    """
    if step >= total_steps:
        return 2 * floor * 0.5 ** (step / total_steps)
    way = min(max(step, warmup), total_steps) / total_steps
    cosine = floor + (peak - floor) * (1 + math.cos(math.pi * way)) / 2
    return cosine * (min(step, warmup) / warmup if warmup else 1.0)


class MemoryTrainer(Trainer):
    """A Trainer for models that take and return `memory`, with or without PEFT adapters.

    Batches contain `shift_labels`, as those of `Segments` do, or `labels`, which the model shifts.
    Logits are computed a few rows at a time and not stored, unless `compute_metrics`, `predict` or
    a custom loss function needs them. `eval_loss` is the mean over all targets.

    Args:
        schedule: maps `(step, total_steps)` to the learning rate; replaces
        `args.lr_scheduler_type`.
    """

    def __init__(
        self, model=None, *args, schedule: Callable[[int, int], float] | None = None, **kwargs
    ):
        self.schedule = schedule
        use_cache = True if model is None else model.config.use_cache
        super().__init__(model, *args, **kwargs)
        config: Any = self.model.config  # type: ignore[union-attr]
        config.use_cache = use_cache  # the Trainer sets it to False, which would be saved
        check_arguments(self)
        self.label_names = list(LABELS)
        self.model_accepts_loss_kwargs = True
        self.skip_logits = self.label_smoother is None and self.compute_loss_func is None
        # One memory per micro-batch; evaluation has a single one.
        self._memory: dict[str, list[Any]] = {"training": [], "evaluation": [None]}
        self._micro_batch = 0
        self._scores: list[torch.Tensor] = []  # of an evaluation: summed losses, number of targets
        self._clock: Any = None  # at the last log: seconds, tokens read
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(MetricsProgressCallback)

    def create_accelerator_and_postprocess(self):
        # A mixer whose output is unused, as in the last layer, has no gradient.
        if self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = True
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            # FSDP2's policy would cast loss, gradients and layer inputs to bfloat16. Use autocast
            # instead, as on a single device.
            plugin.mixed_precision_policy = None

    def autocast_smart_context_manager(self, *args, **kwargs):
        if self.is_fsdp_enabled:  # accelerate does not apply autocast to FSDP2 models
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(*args, **kwargs)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._memory["training"] = [None] * self.args.gradient_accumulation_steps
        self._clock = None
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        return super().train(checkpoint, *args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        self._micro_batch = 0
        if self.state.global_step >= self.state.max_steps:
            # Resumed after its last step, a Trainer would run one more.
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        if self._clock is None:
            self._clock = (time.perf_counter(), self.state.num_input_tokens_seen)
        loss = super().training_step(*args, **kwargs)
        self._micro_batch += 1
        return loss

    def _clip_grad_norm(self, model):
        # With FSDP2 the norm is a DTensor, of which torch 2.9 would log the local part.
        norm = super()._clip_grad_norm(model)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        memories = self._memory["training" if model.training else "evaluation"]
        index = self._micro_batch if model.training else 0
        given = {"memory": memories[index], "return_memory": True, "use_cache": False}
        inputs = {"skip_logits": self.skip_logits, **mask_unscored_labels(inputs), **given}
        if model.training or self.compute_loss_func is not None or get_labels(inputs) is not None:
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        else:  # `predict` without labels
            loss, outputs = None, model(**inputs)
        memories[index] = outputs.memory
        return (loss, outputs) if return_outputs else loss

    def _track_num_input_tokens(self, inputs):
        if self.args.include_num_input_tokens_seen == "non_padding":
            super()._track_num_input_tokens(inputs)
        elif "input_ids" in inputs:
            # Always counted, for `tokens_per_second`. Batches have the same shape on all devices,
            # so no communication is needed.
            tokens = inputs["input_ids"].numel() * self.args.world_size
            self.state.num_input_tokens_seen += tokens

    def _get_num_items_in_batch(self, batch_samples, device):
        """Count the targets of all micro-batches and devices of a step."""
        targets = [get_scored_targets(batch) for batch in batch_samples]
        batches = [{"labels": each, "shift_labels": each} for each in targets if each is not None]
        return super()._get_num_items_in_batch(batches, device)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if ignore_keys is None:
            ignore_keys = DecoderConfig.keys_to_ignore_at_inference
        inputs = self._prepare_inputs(inputs)
        inputs = {**inputs, "skip_logits": self.skip_logits and prediction_loss_only}
        num_items = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items
            )
        if loss is not None and num_items is not None:
            nll = torch.where(num_items > 0, loss.double() * num_items, 0.0)
            self._scores.append(torch.stack((nll, num_items.to(nll))))
        if prediction_loss_only:
            return loss, None, None
        ignored = {"loss", "memory", *ignore_keys}
        logits = tuple(x for name, x in outputs.items() if name not in ignored)
        return loss, logits[0] if len(logits) == 1 else logits, get_labels(inputs)

    def evaluation_loop(self, dataloader, description, *args, **kwargs):
        size, devices = self.args.eval_batch_size, self.args.world_size
        check_num_rows(getattr(dataloader, "dataset", None), size, devices, 1)
        start = time.perf_counter()
        self._memory["evaluation"] = [None]
        self._scores.clear()
        with torch.random.fork_rng(devices=[]):  # data loaders draw random numbers
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        self._memory["evaluation"] = [None]
        if self._clock is not None:
            self._clock = (self._clock[0] + time.perf_counter() - start, self._clock[1])
        loss_name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if not self._scores:
            if description != "Prediction" and loss_name not in (output.metrics or {}):
                raise ValueError(
                    "the evaluation data gives no loss: add labels or shift_labels to each item, "
                    f"and pass at least {size * devices} items, the rows of a step"
                )
            return output
        # The Trainer averages over batches; average over targets instead, as in training.
        nll, targets = self.accelerator.reduce(torch.stack(self._scores).sum(0), "mean").tolist()
        if targets == 0:
            raise ValueError(
                "the evaluation data has no targets, all labels are -100: pass documents of at "
                "least two tokens, or labels that are ids"
            )
        return output._replace(metrics={**(output.metrics or {}), loss_name: nll / targets})

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
        """Return the names of matrices; biases and scales have no weight decay."""
        return [name for name, weight in model.named_parameters() if weight.ndim > 1]

    def log(self, logs, *args, **kwargs):
        for name in ("loss", "eval_loss"):
            if name in logs:
                logs[name.replace("loss", "perplexity")] = perplexity(logs[name], self.state)
        if "loss" in logs and self._clock is not None:
            (before, read), now = self._clock, time.perf_counter()
            tokens = self.state.num_input_tokens_seen
            logs["tokens_per_second"] = (tokens - read) / (now - before)
            self._clock = (now, tokens)
            logs.update(memory_metrics(self.accelerator, self.model, self._memory["training"]))
        super().log(logs, *args, **kwargs)

    def whole_model(self):
        """Return the trained model in float32 on rank 0, gathered if it is sharded; None elsewhere.

        All processes must call this method.
        """
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if not self.is_fsdp_enabled:
            return model if self.is_world_process_zero() else None
        weights = self.accelerator.get_state_dict(self.model)
        if not self.is_world_process_zero():
            return None
        whole = AutoModelForCausalLM.from_config(model.config)
        whole.load_state_dict(weights)
        return whole.to(self.args.device)

    def _checkpoint_to_resume(self, given):
        """Return the given or the last checkpoint, after checking it."""
        if not given:
            return None
        if given is True:
            checkpoint, _ = last_complete_checkpoint(Path(str(self.args.output_dir)))
            if checkpoint is None:
                raise ValueError(
                    f"{self.args.output_dir} has no complete checkpoint to resume from"
                )
        else:
            checkpoint = Path(given)
            reason = incomplete_reason(checkpoint, contents=False)
            if reason is not None:
                raise ValueError(
                    f"cannot resume from {checkpoint}: {reason}; pass an older checkpoint"
                )
        check_num_processes(checkpoint, self.args.world_size)
        return str(checkpoint)

    def _save_checkpoint(self, model, trial):
        """Save a checkpoint; remove older ones only after it is complete."""
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        first = self.is_world_process_zero()
        if first and checkpoint.exists():  # left by an interrupted run
            shutil.rmtree(checkpoint)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if first:
            mark_complete(checkpoint, self.args.world_size)
            remove_old_checkpoints(checkpoint, limit, self.state.best_model_checkpoint)

    # The Trainer calls these two on every rank, the second when it resumes.

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # The sum since the last log, for the next logged mean.
        save_file({"loss": self._tr_loss.cpu()}, self._loss_file(output_dir))
        if self._memory["training"]:
            empty = self._empty_memory()
            memories = [empty if memory is None else memory for memory in self._memory["training"]]
            save_memory(memories, self._memory_file(output_dir))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        self._tr_loss.copy_(load_file(self._loss_file(checkpoint))["loss"])
        logged = [int(entry["step"]) for entry in self.state.log_history if "loss" in entry]
        self._globalstep_last_logged = max(logged, default=0)
        empty = [self._empty_memory()] * self.args.gradient_accumulation_steps
        self._memory["training"] = load_memory(
            empty, self._memory_file(checkpoint), self.args.device
        )

    def _empty_memory(self):
        decoder = unwrap_decoder(self.model)
        return decoder.empty_memory(self.args.per_device_train_batch_size)

    def _loss_file(self, checkpoint):
        return Path(checkpoint) / f"loss_{self.args.process_index}.safetensors"

    def _memory_file(self, checkpoint):
        return Path(checkpoint) / f"memory_{self.args.process_index}.safetensors"


class MetricsProgressCallback(ProgressCallback):
    """Progress bar that shows the metrics in the bar instead of printing lines."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in (logs or {}):
            loss, speed = f"{logs['loss']:.3f}", f"{logs['tokens_per_second']:,.0f}"
            self.training_bar.set_postfix({"loss": loss, "tokens/s": speed})


def get_labels(batch):
    return next((batch[name] for name in LABELS if batch.get(name) is not None), None)


def get_scored_targets(batch):
    """Return the targets (B T, -100: ignored) that the model scores; None without labels."""
    targets = shift_targets(batch.get("labels"), batch.get("shift_labels"))
    if targets is None:
        return None
    return mask_targets_before_first_token(targets, batch.get("attention_mask"))


def mask_unscored_labels(batch):
    """Set labels that the model does not score to -100, for exact counts."""
    targets = get_scored_targets(batch)
    if targets is None or batch.get("attention_mask") is None:
        return batch
    if batch.get("shift_labels") is not None:
        return {**batch, "shift_labels": targets}
    return {**batch, "labels": pad(targets[:, :-1], (1, 0), value=IGNORED)}


def perplexity(loss, state):
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} at step {state.global_step}: "
            "try a lower learning rate, a longer warm-up, or float32"
        )
    return math.exp(min(loss, 700.0))


def check_arguments(trainer):
    """Raise ValueError for arguments that would separate rows from their memory."""
    args = trainer.args
    if args.n_gpu > 1:
        raise ValueError(
            f"nn.DataParallel ({args.n_gpu} GPUs in one process) is not supported: it separates "
            f"rows from their memory; use torchrun --nproc-per-node={args.n_gpu}, or set "
            "CUDA_VISIBLE_DEVICES=0 to use one GPU"
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
                f"{name}={getattr(args, name)!r} is not supported: memory is carried between "
                f"steps, so the data must be read in order; pass {name}={value!r}"
            )
    if trainer.compute_metrics is not None and args.prediction_loss_only:
        raise ValueError(
            "compute_metrics needs logits, but prediction_loss_only is True: pass "
            "prediction_loss_only=False, or no compute_metrics"
        )
    micro_batches = args.gradient_accumulation_steps
    check_num_rows(trainer.train_dataset, args.train_batch_size, args.world_size, micro_batches)
    check_num_rows(trainer.eval_dataset, args.eval_batch_size, args.world_size, 1)


def check_num_rows(dataset, size, devices, micro_batches):
    """Raise ValueError if the segments have another number of rows than a step."""
    rows = size * devices * micro_batches
    if isinstance(dataset, Segments) and dataset.num_rows != rows:
        raise ValueError(
            f"the data set has num_rows={dataset.num_rows}, but a step has {rows} rows ({size} x "
            f"{micro_batches} micro-batches x {devices} devices): pass num_rows={rows} to Segments"
        )


def save_memory(memory, path):
    """Save the tensors and numbers of a memory to one file."""
    leaves, _ = tree_flatten(memory)
    tensors = {str(i): x.cpu().contiguous() for i, x in enumerate(leaves) if torch.is_tensor(x)}
    numbers = {str(i): x for i, x in enumerate(leaves) if not torch.is_tensor(x)}
    save_file({name: x.clone() for name, x in tensors.items()}, path, {"json": json.dumps(numbers)})


def load_memory(empty, path, device):
    """Load a memory with the structure of an empty one, and check its shapes."""
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: the checkpoint is damaged or was written by another number of "
            "processes; use the same number, or another checkpoint"
        )
    leaves, structure = tree_flatten(empty)
    with safe_open(path, "pt") as file:  # does not accept the device cpu:0
        found = json.loads(file.metadata()["json"])
        found |= {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
    loaded = [found.get(str(i)) for i in range(len(leaves))]
    fits = (is_compatible_leaf(*pair) for pair in zip(leaves, loaded, strict=True))
    if len(found) != len(leaves) or not all(fits):
        raise ValueError(
            f"the memory in {path} belongs to another model or batch size: use the same as before"
        )
    return tree_unflatten(loaded, structure)


def is_compatible_leaf(empty, leaf):
    """Tell whether a leaf has the shape of the empty one, in which a size of 0 may grow.

    These sizes are the slots of the current window, which are added as tokens are read.
    """
    sizes, found = (tuple(x.shape) if torch.is_tensor(x) else None for x in (empty, leaf))
    if sizes is None or found is None:
        return sizes == found
    return len(sizes) == len(found) and all(a in (0, b) for a, b in zip(sizes, found, strict=True))
