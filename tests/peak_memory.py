"""Measure the peak memory of a training step of a Memorizing Transformer, in a new process.

`python -m tests.peak_memory` prints a table of several lengths of the memory.
"""

import subprocess
import sys

WINDOW, SEGMENT_WINDOWS, HEADS, CHANNELS = 512, 8, 2, 16
BLOCK = 2**20  # elements of a block of scores
MODELS = ("in_stack", "joint", "side")
LENGTHS = (1024, 8192, 65536)
PROGRAM = """
import sys
from tests.peak_memory import BLOCK, build, peak, step
from melodi_hf.models import retrieval
retrieval.BLOCK = BLOCK
model = build(sys.argv[1], int(sys.argv[2]))
memory = model.model.empty_memory(1)
for tensor in memory.layers[0]:
    tensor.normal_()  # zeros may not be allocated until they are written
before = peak()
step(model, memory)
print(before, peak())
"""


def build(name, length):
    from melodi_hf import MemorizingTransformerConfig, MemorizingTransformerForCausalLM

    kinds = {
        "in_stack": {},
        "joint": {"retrieval": "dense", "memory_combination": "joint"},
        "side": {
            "placement": "side",
            "retrieval": "dense",
            "memory_combination": "joint",
            "segment_windows": SEGMENT_WINDOWS,
        },
    }
    config = MemorizingTransformerConfig(
        vocab_size=64,
        hidden_size=HEADS * CHANNELS,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        head_dim=CHANNELS,
        intermediate_size=128,
        window_length=WINDOW,
        memory_layer=0,
        memory_length=length,
        **kinds[name],
    )
    return MemorizingTransformerForCausalLM(config).train()


def step(model, memory):
    """Run one training step of one segment."""
    import torch

    torch.set_num_threads(1)
    ids = torch.randint(64, (1, SEGMENT_WINDOWS * WINDOW))
    output = model(ids, labels=ids, memory=memory, return_memory=True)
    output.loss.backward()


def peak():
    """Read the peak resident memory of this process, in bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def measure(name, length):
    """Measure the peak memory of a step above that before it, in bytes."""
    command = [sys.executable, "-c", PROGRAM, name, str(length)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)
    before, after = map(int, printed.stdout.split())
    return after - before


def memory_bytes(name, length):
    """Compute the bytes of the keys and values of the memory in float32."""
    slots = length + (SEGMENT_WINDOWS - 1) * WINDOW * (name == "side")
    return 2 * 4 * slots * HEADS * CHANNELS


def mask_bytes(length):
    """Compute the bytes of all scores of a segment in float32."""
    queries = SEGMENT_WINDOWS * WINDOW
    return 4 * HEADS * queries * (length + queries)


def main():
    sys.stdout.write("            entries   memory MB   peak MB   queries x entries MB\n")
    for name in MODELS:
        for length in LENGTHS:
            sizes = (memory_bytes(name, length), measure(name, length), mask_bytes(length))
            cells = "".join(f"{size / 2**20:12.0f}" for size in sizes)
            sys.stdout.write(f"{name:10}{length:9,}{cells}\n")


if __name__ == "__main__":
    main()
