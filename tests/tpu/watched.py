"""training/train.py, with torch_xla's own figures around every step.

python tests/tpu/watched.py FIGURES.json STOP_AT [arguments of train.py]

FIGURES.json then holds a list of {"step", "when", "compilations", "reads", "fallbacks", "whole"}.
Three are counted from the start: graphs compiled, tensors that were brought to the host, and
operators that had to be computed there; "whole" are the weights and the parts of the memory that
are not cut over several devices. STOP_AT: the step after which the process ends, as if a user had
pulled the plug; 0: never.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch_xla
import torch_xla.debug.metrics as metrics
import train
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback


def count(name):
    data = metrics.metric_data(name)
    return data[0] if data else 0


def is_whole(tensor):
    return "devices=" not in torch_xla._XLAC._get_xla_sharding_spec(tensor)


class Watch(TrainerCallback):
    """Takes the figures."""

    def __init__(self, path, stop_at, trainer):
        self.path, self.stop_at, self.trainer = Path(path), int(stop_at), trainer
        self.figures = []

    def note(self, step, when):
        fallbacks = [name for name in metrics.counter_names() if name.startswith("aten::")]
        figures = {
            "step": step,
            "when": when,
            "compilations": count("CompileTime"),  # codespell:ignore
            "reads": count("TransferFromDeviceTime"),
            "fallbacks": sum(map(metrics.counter_value, fallbacks)),
            "whole": sum(map(is_whole, self.tensors())),
        }
        self.figures.append(figures)
        self.path.write_text(json.dumps(self.figures))

    def tensors(self):
        memory = filter(torch.is_tensor, tree_leaves(self.trainer._memory["training"]))
        return [*self.trainer.model.parameters(), *(part for part in memory if part.numel())]

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.stop_at > 0:
            os._exit(1)
        self.note(state.global_step + 1, "before")

    def on_step_end(self, args, state, control, **kwargs):
        self.note(state.global_step, "after")


def main(path, stop_at, *arguments):
    make_trainer = train.make_trainer

    def make_watched_trainer(*given):
        trainer = make_trainer(*given)
        trainer.add_callback(Watch(path, stop_at, trainer))
        return trainer

    train.make_trainer = make_watched_trainer
    train.main(arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
