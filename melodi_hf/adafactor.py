"""The optimiser of the paper: transformers' Adafactor, also for weights that FSDP2 deals out.

transformers makes the sums along rows and columns as ordinary tensors, which do not add up with
the parts of a gradient; made from the gradient, they are dealt out as it is.
"""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate
from transformers import Adafactor

# The rule of the released code. Paper: the class keeps the second moment of every matrix in
# factored form; the released code does so only where both of its sides are 128 or more.
OPTIONS = {
    "eps": (1e-30, 1e-3),
    "clip_threshold": 1.0,
    "decay_rate": -0.8,
    "beta1": 0.9,
    "weight_decay": 0.0,
    "scale_parameter": True,
    "relative_step": False,
    "warmup_init": False,
}


class PaperAdafactor(Adafactor):
    """transformers' class; each device keeps the state of its part of a weight."""

    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if isinstance(weight.grad, DTensor) and not self.state[weight]:
                    self.state[weight].update(empty_state(weight.grad, group["beta1"] is not None))
        return super().step(closure)


def empty_state(grad, momentum):
    """What transformers' class keeps of a weight before the first step, laid out like `grad`."""
    state: dict[str, Any] = {"step": 0, "RMS": 0}
    if momentum:
        state["exp_avg"] = torch.zeros_like(grad)
    if grad.ndim < 2:
        return state | {"exp_avg_sq": torch.zeros_like(grad)}
    everywhere = [Replicate()] * grad.device_mesh.ndim  # each device has a part of every column
    columns = grad.mean(dim=-2).redistribute(placements=everywhere)
    return state | {
        "exp_avg_sq_row": torch.zeros_like(grad.mean(dim=-1)),
        "exp_avg_sq_col": torch.zeros_like(columns),
    }
