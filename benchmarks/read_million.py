"""Measure the peak memory of reading 10 000 and 1 000 000 tokens.

    python benchmarks/read_million.py [--tokens 10000 1000000] [--output FILE] [--tiny]

Each read is a separate process; its peak is the maximum resident memory, including Python, torch
and the model. The document is generated in parts during reading, like one from a file. The C
library is set to release memory immediately, since its cache varies by some megabytes from run to
run.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import training.parts.threads  # noqa: F401  # before torch

PART = 3000  # tokens per part; not a multiple of a window
SMALL = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 16,
    "intermediate_size": 256,
    "window_length": 256,
    "num_summary_tokens": 16,
    "num_short_memory_tokens": 16,
    "long_memory_layers": [2],
    "num_long_memory_tokens": 8,
    "long_memory_windows": 128,
}
TINY = SMALL | {"hidden_size": 8, "num_hidden_layers": 1, "head_dim": 4, "long_memory_layers": [0]}


def draw_parts(vocab_size, tokens):
    """Generate a document of random ids in parts."""
    import torch

    for start in range(0, tokens, PART):
        yield torch.randint(0, vocab_size, (min(PART, tokens - start),))


def peak_bytes():
    """Return the peak resident memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the parent process
        lines = status.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    kilobytes = platform.system() != "Darwin"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if kilobytes else 1)


def read(sizes, tokens):
    """Read once in this process; return a row of the report."""
    import torch

    from melodi_hf import MelodiConfig, MelodiForCausalLM

    torch.manual_seed(0)
    model = MelodiForCausalLM(MelodiConfig(**sizes)).eval()
    began = time.process_time()  # CPU time, since other programs may be running
    cache = model.read_document(draw_parts(model.config.vocab_size, tokens))
    seconds = time.process_time() - began
    assert cache.get_seq_length() == tokens
    return {
        "tokens": tokens,
        "peak MB": round(peak_bytes() / 1e6, 1),
        "memory held, bytes": cache.memory_bytes(),
        "CPU seconds": round(seconds, 1),
        "tokens per CPU second": round(tokens / seconds),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def run_in_subprocess(sizes, tokens):
    command = [sys.executable, __file__, "--child", json.dumps([sizes, tokens])]
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    child = subprocess.run(command, env=os.environ | at_once, stdout=subprocess.PIPE, check=True)
    return json.loads(child.stdout)


def main():
    if sys.argv[1:2] == ["--child"]:  # first, to keep the peak low
        print(json.dumps(read(*json.loads(sys.argv[2]))))
        return
    from melodi_hf.evaluation.command_line import output_file, positive_int, print_device

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=positive_int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument(
        "--output", type=output_file, default="benchmarks/results/read_million.json"
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a smoke test")
    args = parser.parse_args()
    print_device("cpu", "float32")
    sizes = TINY if args.tiny else SMALL
    rows = [run_in_subprocess(sizes, tokens) for tokens in args.tokens]
    machine = {name: rows[0][name] for name in ("torch", "threads")}
    for row in rows:
        for name in machine:
            del row[name]
    result = {
        "rows": rows,
        "peak of the last over that of the first": round(
            rows[-1]["peak MB"] / rows[0]["peak MB"], 3
        ),
        "config": sizes,
        "part of the source, tokens": PART,
        **machine,
        "machine": platform.machine(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
