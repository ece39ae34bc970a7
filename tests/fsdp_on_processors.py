"""training/train.py where accelerate takes each process for one with an accelerator.

It has FSDP on accelerators only; what it does there runs on processors as well.
"""

import os
import sys
from pathlib import Path

from accelerate import DistributedType, PartialState

TRAINING = Path(__file__).parents[1] / "training"


def pretend_that_processors_are_devices():
    begin = PartialState.__init__

    def init(state, *args, **kwargs):
        begin(state, *args, **kwargs)
        sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        if sharded and state.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            state.__dict__.update(PartialState._shared_state)

    PartialState.__init__ = init


if __name__ == "__main__":
    sys.path.insert(0, str(TRAINING))
    from train import main

    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # those of the file for accelerate
    pretend_that_processors_are_devices()
    main()
