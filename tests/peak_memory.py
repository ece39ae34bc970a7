"""What a training step of a Memorizing Transformer takes at its peak, in a process of its own.

`python -m tests.peak_memory` prints it for several lengths of the memory.
"""

import subprocess
import sys

WINDOW, SEGMENT_WINDOWS, HEADS, CHANNELS = 512, 8, 2, 16
BLOCK = 2**20  # scores at once, here
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
    tensor.normal_()  # held indeed: zeros are only promised
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
    """One training step of one segment."""
    import torch

    torch.set_num_threads(1)
    ids = torch.randint(64, (1, SEGMENT_WINDOWS * WINDOW))
    output = model(ids, labels=ids, memory=memory, return_memory=True)
    output.loss.backward()


def peak():
    """Bytes that this process held at most."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def measure(name, length):
    """Bytes that a step takes at its peak above what is held before it, the memory included."""
    command = [sys.executable, "-c", PROGRAM, name, str(length)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)
    before, after = map(int, printed.stdout.split())
    return after - before


def memory_bytes(name, length):
    """Of keys and values in float32."""
    slots = length + (SEGMENT_WINDOWS - 1) * WINDOW * (name == "side")
    return 2 * 4 * slots * HEADS * CHANNELS


def mask_bytes(length):
    """Of scores between all queries of a segment and all that they could see, in float32."""
    queries = SEGMENT_WINDOWS * WINDOW
    return 4 * HEADS * queries * (length + queries)


def main():
    sys.stdout.write("            entries   memory MB   peak MB   queries x entries MB\n")
    for name in MODELS:
        for length in LENGTHS:
            figures = (memory_bytes(name, length), measure(name, length), mask_bytes(length))
            cells = "".join(f"{figure / 2**20:12.0f}" for figure in figures)
            sys.stdout.write(f"{name:10}{length:9,}{cells}\n")


if __name__ == "__main__":
    main()
