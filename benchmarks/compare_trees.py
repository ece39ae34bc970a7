"""Compare the speed of two checkouts, round by round on the same machine.

    git worktree add ../before 420ad16
    python benchmarks/compare_trees.py ../before [--rounds 5] [--threads 1] [--tiny]
        [--output benchmarks/results/compare_trees.json]

Each checkout runs in its own process. A round measures each phase in one and then in the other, in
alternating order; the median of the rounds' ratios (this checkout over the other) is
reported. Seconds are CPU seconds. The size is the reference size of `benchmarks/speed.py`, one row;
"ragged" is a padded batch of eight rows of different lengths at the size of `benchmarks/ragged.py`.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("training step", "forward", "prefill", "decoding", "ragged training", "ragged prefill")
DECODED = 64  # tokens of a round
LENGTHS = (192, 320, 448, 576, 704, 832, 960, 1088)  # tokens of the ragged rows
REFERENCE = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "head_dim": 64,
    "intermediate_size": 2048,
    "window_length": 512,
    "num_summary_tokens": 64,
    "num_short_memory_tokens": 64,
    "long_memory_layers": (4,),
    "num_long_memory_tokens": 32,
    "long_memory_windows": 128,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
RAGGED = REFERENCE | {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "window_length": 128,
    "num_summary_tokens": 32,
    "num_short_memory_tokens": 32,
    "long_memory_layers": (2,),
    "num_long_memory_tokens": 16,
    "long_memory_windows": 32,
}
TINY = RAGGED | {"vocab_size": 100, "hidden_size": 32, "window_length": 32, "head_dim": 8}


def phases(segment, reference, ragged):
    """Build the models and return phase -> a function that runs it once."""
    import torch

    from melodi_hf import MelodiCache, MelodiConfig, MelodiForCausalLM

    torch.manual_seed(0)
    model = MelodiForCausalLM(MelodiConfig(**reference)).eval()
    padded = MelodiForCausalLM(MelodiConfig(**ragged)).eval()
    ids = torch.randint(1, reference["vocab_size"], (1, segment))
    rows = torch.randint(1, ragged["vocab_size"], (len(LENGTHS), max(LENGTHS)))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    labels = rows.masked_fill(mask == 0, -100)
    decoding = MelodiCache(model.config)

    def train(model, **inputs):
        model.zero_grad(set_to_none=True)
        model(**inputs, use_cache=False, skip_logits=True).loss.backward()

    @torch.no_grad()
    def prefill(model, *inputs, **more):
        model(*inputs, **more, cache=MelodiCache(model.config), logits_to_keep=1)

    @torch.no_grad()
    def forward():
        model(ids, use_cache=False)

    @torch.no_grad()
    def decode():
        for token in ids[0, :DECODED]:
            model(token.view(1, 1), cache=decoding)

    return {
        "training step": lambda: train(model, input_ids=ids, labels=ids),
        "forward": forward,
        "prefill": lambda: prefill(model, ids),
        "decoding": decode,
        "ragged training": lambda: train(
            padded, input_ids=rows, labels=labels, attention_mask=mask
        ),
        "ragged prefill": lambda: prefill(padded, rows, attention_mask=mask),
    }


def serve(connection, tree, threads, segment, reference, ragged):
    """Measure one phase after the other, as asked, with the code of a checkout."""
    sys.path.insert(0, str(tree))
    import torch

    torch.set_num_threads(threads)
    works = phases(segment, reference, ragged)
    while (name := connection.recv()) is not None:
        start = time.process_time()
        works[name]()
        connection.send(time.process_time() - start)


def start(tree, *given):
    """Start the process of a checkout; returns a function phase -> CPU seconds."""
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.Process(target=serve, args=(theirs, tree, *given), daemon=True).start()

    def measure(name):
        ours.send(name)
        return ours.recv()

    return measure


def compare(measures, rounds, progress):
    """Measure all phases in all rounds; returns a row per phase."""
    seconds = {name: [] for name in PHASES}
    for i in progress(range(-1, rounds)):  # the first round allocates buffers
        for name in PHASES:
            order = (0, 1) if i % 2 == 0 else (1, 0)
            pair = {which: measures[which](name) for which in order}
            if i >= 0:
                seconds[name].append((pair[0], pair[1]))
    return [
        {
            "phase": name,
            "ratio": round(statistics.median(here / there for here, there in pairs), 3),
            "seconds here": round(statistics.median(here for here, _ in pairs), 3),
            "seconds there": round(statistics.median(there for _, there in pairs), 3),
            "ratios": [round(here / there, 3) for here, there in pairs],
        }
        for name, pairs in seconds.items()
    ]


def main():
    """Compare this checkout with another one."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if not (args.other / "melodi_hf").is_dir():
        parser.error(f"{args.other} is not a checkout: name a folder that contains melodi_hf")
    multiprocessing.set_start_method("spawn")
    sizes = (256, TINY, TINY) if args.tiny else (4096, REFERENCE, RAGGED)
    given = args.threads, *sizes
    measures = [start(tree, *given) for tree in (ROOT, args.other.resolve())]
    results = compare(measures, args.rounds, tqdm)
    for row in results:
        sys.stdout.write(f"{row['phase']:16} {row['ratio']:.3f}  {row['seconds here']} s\n")
    if args.output is not None:
        text = json.dumps(
            {"rounds": args.rounds, "threads": args.threads, "rows": results}, indent=1
        )
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
