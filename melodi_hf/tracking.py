"""Metrics of the memories, and callbacks for TensorBoard, Weights & Biases and trackio.

Each tracker is used if it is installed. None needs an account or a network: Weights & Biases runs
offline unless WANDB_MODE is set (`wandb sync` uploads its files), and trackio stores data locally.
"""

import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from melodi_hf.models.memory_file import unwrap_decoder


def memory_metrics(accelerator, model, memories) -> dict[str, float]:
    """Compute metrics of a model's memories (`DecoderModel.metrics`): means over the rows of all
    micro-batches and devices. All processes must call this; it waits for the devices."""
    decoder = unwrap_decoder(model)
    metrics = [decoder.metrics(memory) for memory in memories if memory is not None]
    if not metrics or not metrics[0]:
        return {}
    values = torch.stack(
        [torch.stack([gather_metric(x) for x in one.values()]) for one in metrics]
    ).mean(0)
    values = accelerator.reduce(values, "mean")
    return dict(zip(metrics[0], values.tolist(), strict=True))


def gather_metric(value):
    """Gather a metric that FSDP may have sharded."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def trackers(folder: Path) -> list[TrainerCallback]:
    """Return the callbacks of installed trackers; the first two write their files to `folder`."""
    known = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}
    found: list[TrainerCallback] = []
    for package, callback in known.items():
        with suppress(ImportError):
            import_module(package)
            found.append(callback(folder))
    return found


class TensorBoard(TensorBoardCallback):
    """TensorBoard callback of transformers that supports resumed runs."""

    def __init__(self, folder: Path):
        super().__init__()
        self.logging_dir = str(folder)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            # Remove points logged after the checkpoint; they will be logged again.
            self.tb_writer = SummaryWriter(self.logging_dir, purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)


class WeightsAndBiases(WandbCallback):
    """Weights & Biases callback of transformers, offline by default."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def setup(self, args, state, model, **kwargs):
        if state.is_world_process_zero:
            import wandb

            wandb.init(
                project=os.environ.get("WANDB_PROJECT", args.project),
                name=args.run_name,
                dir=self.folder,
                mode=os.environ.get("WANDB_MODE", "offline"),
            )
        super().setup(args, state, model, **kwargs)

    def on_train_end(self, args, state, control, *rest, **kwargs):
        super().on_train_end(args, state, control, *rest, **kwargs)
        if state.is_world_process_zero:
            import wandb

            wandb.finish()


class Trackio(TrackioCallback):
    """trackio callback of transformers."""

    def __init__(self, folder: Path):
        super().__init__()
