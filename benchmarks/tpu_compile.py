"""Measure the compilation of a training step on torch_xla by the number of windows.

    PJRT_DEVICE=CPU python benchmarks/tpu_compile.py [--windows 8 16 64] [--output FILE]

"loop" reads the windows in one XLA loop, as training does; "unrolled" uses a Python loop. A step is
forward and backward of the loss. Operations are counted in the graph before XLA optimises it; CPU
seconds are those of compiling and running it once.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch_xla
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from melodi_hf import MelodiConfig, MelodiForCausalLM, TransformerXLConfig, TransformerXLForCausalLM
from melodi_hf.evaluation.command_line import output_file, positive_int, print_device
from melodi_hf.models.windows import plan_windows
from melodi_hf.tpu import plan_loop

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "window_length": 8,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
MELODI = {
    "num_summary_tokens": 2,
    "num_short_memory_tokens": 2,
    "long_memory_layers": (1,),
    "num_long_memory_tokens": 2,
    "long_memory_windows": 4,
}
VARIANTS = {"loop": plan_loop, "unrolled": plan_windows}
ROWS = 2


def measure(model, windows, way):
    """Trace, compile and run one step."""
    model.base_model.plan_windows = VARIANTS[way]
    model.zero_grad(set_to_none=True)
    shape = ROWS, windows * model.config.window_length
    ids = torch.randint(0, model.config.vocab_size, shape).to(model.device)
    memory = model.base_model.empty_memory(ROWS)
    torch_xla.sync(wait=True)
    start = time.process_time()
    loss = model(ids, shift_labels=ids, memory=memory, return_memory=True, use_cache=False).loss
    loss.backward()
    recorded = time.process_time()
    made = [loss, *(weight.grad for weight in model.parameters() if weight.grad is not None)]
    graph = torch_xla._XLAC._get_xla_tensors_hlo(made)
    start_of_compilation = time.process_time()
    torch_xla.sync(wait=True)
    return {
        "operations": graph.count(" = "),
        "CPU seconds to record": round(recorded - start, 2),
        "CPU seconds to compile": round(time.process_time() - start_of_compilation, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=positive_int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--output", type=output_file, default="benchmarks/results/tpu_compile.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch_xla.device()  # before any backward, so that autograd knows the device
    print_device(device, torch.float32)
    models = {
        "MELODI": MelodiForCausalLM(MelodiConfig(**SIZES, **MELODI)),
        "Transformer-XL": TransformerXLForCausalLM(TransformerXLConfig(**SIZES)),
    }
    result = {"rows": [], "sizes": SIZES | MELODI, "rows per batch": ROWS}
    result |= {"torch_xla": torch_xla.__version__, "device": os.environ.get("PJRT_DEVICE")}
    result["XLA_FLAGS"] = os.environ.get("XLA_FLAGS")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    cases = [(m, n, w) for m in models for n in args.windows for w in VARIANTS]
    for name, windows, way in tqdm(cases, desc="cases", unit="case"):
        model = models[name].to(device).train()
        model.tie_weights()
        found = {"model": name, "windows": windows, "read by": way} | measure(model, windows, way)
        result["rows"].append(found)
        args.output.write_text(json.dumps(result, indent=1) + "\n")  # the last ones are slow
    print(json.dumps(result["rows"], indent=1))


if __name__ == "__main__":
    main()
