"""The optimiser of the paper: Adafactor of transformers, also for weights sharded by FSDP2.

transformers allocates the factored state as plain tensors, which cannot be combined with the
DTensor gradients of FSDP2. Here the state is created from the gradient and has the same sharding.
"""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate
from transformers import Adafactor

# The settings of the released code. Paper: this class factors the second moment of every matrix;
# the released code only if both sides are 128 or more.
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
    """Adafactor of transformers, with sharded state for sharded weights."""

    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if isinstance(weight.grad, DTensor) and not self.state[weight]:
                    self.state[weight].update(
                        initial_state(weight.grad, group["beta1"] is not None)
                    )
        return super().step(closure)


def initial_state(grad, momentum):
    """Create the optimizer state of a weight before the first step, sharded like `grad`."""
    state: dict[str, Any] = {"step": 0, "RMS": 0}
    if momentum:
        state["exp_avg"] = torch.zeros_like(grad)
    if grad.ndim < 2:
        return state | {"exp_avg_sq": torch.zeros_like(grad)}
    everywhere = [Replicate()] * grad.device_mesh.ndim  # the mean over rows needs all shards
    columns = grad.mean(dim=-2).redistribute(placements=everywhere)
    return state | {
        "exp_avg_sq_row": torch.zeros_like(grad.mean(dim=-1)),
        "exp_avg_sq_col": torch.zeros_like(columns),
    }
