"""What is told of a run while it runs: figures of its memories, and who draws them.

TensorBoard, Weights & Biases and trackio are told if they are installed. None of them asks for an
account or waits for a network: Weights & Biases writes files, which `wandb sync` sends, unless
WANDB_MODE says otherwise, and trackio keeps its own on this machine.
"""

import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from melodi_hf.models.adapters import unwrap_decoder


def memory_figures(accelerator, model, memories) -> dict[str, float]:
    """What the model tells of its memories (`DecoderModel.figures`): means over the rows of all
    micro-batches and devices. All processes must call this; it waits for the devices."""
    decoder = unwrap_decoder(model)
    told = [decoder.figures(memory) for memory in memories if memory is not None]
    if not told or not told[0]:
        return {}
    values = torch.stack([torch.stack([whole(x) for x in one.values()]) for one in told]).mean(0)
    values = accelerator.reduce(values, "mean")
    return dict(zip(told[0], values.tolist(), strict=True))


def whole(figure):
    """A number of which FSDP may have left a part on each device."""
    return figure.full_tensor() if hasattr(figure, "full_tensor") else figure


def trackers(folder: Path) -> list[TrainerCallback]:
    """Callbacks of those that can be imported; `folder` is for the files of the first two."""
    known = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}
    found: list[TrainerCallback] = []
    for package, callback in known.items():
        with suppress(ImportError):
            import_module(package)
            found.append(callback(folder))
    return found


class TensorBoard(TensorBoardCallback):
    """transformers' callback, for runs that are stopped and go on."""

    def __init__(self, folder: Path):
        super().__init__()
        self.logging_dir = str(folder)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            # What was drawn beyond the checkpoint that the run goes on from is drawn anew.
            self.tb_writer = SummaryWriter(self.logging_dir, purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)


class WeightsAndBiases(WandbCallback):
    """transformers' callback, which would ask for an account and wait for its server."""

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
    """transformers' callback, which needs no folder."""

    def __init__(self, folder: Path):
        super().__init__()
