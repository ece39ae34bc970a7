"""Compare MELODI with Llama, a sliding window, RecurrentGemma and Mamba2 by document length.

    python benchmarks/peers.py [--size small] [--lengths 4096 ... 262144] [--rounds 3 3 1]
        [--limit 180] [--threads 1] [--device cpu] [--output benchmarks/results/peers.json] [--tiny]
    python benchmarks/peers.py --size paper --device cuda

Batch size 1; `benchmarks/parts/peer_models.py` describes how the sizes are matched.

Prefill computes the last logits only. Each model reads in pieces of the length that was fastest in
a trial; Llama may also read in one call, for torch's causal kernel. Llama decodes with a
`StaticCache`, since a `DynamicCache` is copied at each token. (In transformers, RecurrentGemma's
convolution does not cross pieces; this changes its results, not its cost.)

    seconds    one process per length with all models, in alternating rounds; decoding: mean over
    one
               window of tokens, fewer for Llama
    memory     peak of a prefill above the loaded model, in a separate process
    state      bytes of all tensors kept between tokens

A prefill that would take longer than the limit is recorded as too long, one that runs out of memory
as failed.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from benchmarks.parts.floor import Machine, run_in_subprocess, write_json  # before torch
from benchmarks.parts.peer_models import (
    LENGTHS,
    PEERS,
    Reader,
    config_sizes,
    matched_config,
    melodi_config,
    parameters,
)
from melodi_hf.evaluation.command_line import (
    device_name,
    output_file,
    positive_float,
    positive_int,
    print_device,
)

# Run in subprocesses.


def trial(request, machine):
    """Measure the seconds of each model by piece length, after a warm-up."""
    found = {}
    for name in request["names"]:
        reader, seconds = Reader(name, request["size"], machine), {}
        ids = reader.draw(request["tokens"])
        reader.prefill(ids[:, : request["pieces"][0]], None)
        for piece in request["pieces"]:
            seconds[str(piece)] = reader.prefill(ids, piece)
        if reader.peer.grows:
            seconds["one call"] = reader.prefill(ids, None)
        found[name] = seconds
    return found


def memory(request, machine):
    """Measure the peak of one prefill above the loaded model."""
    reader = Reader(request["name"], request["size"], machine)
    ids = reader.draw(request["tokens"])
    reader.prefill(ids[:, :64], None)
    reader.forget()
    before = machine.reset_peak()
    reader.prefill(ids, request["piece"])
    return {"peak": machine.peak() - before}


def times(request, machine):
    """Measure prefill, decoding and state of each model in rounds, or record its error."""
    readers, found = {}, {}
    for name in request["pieces"]:
        readers[name] = Reader(name, request["size"], machine)
        ids = readers[name].draw(request["tokens"])
        readers[name].prefill(ids[:, :1024], 512)  # warm-up
        found[name] = {"prefill": [], "decoding": []}
    for _ in range(request["rounds"]):
        for name, reader in list(readers.items()):
            try:
                found[name]["prefill"].append(reader.prefill(ids, request["pieces"][name]))
            except (RuntimeError, MemoryError) as error:  # out of memory: continue with the others
                found[name] = {"failed": str(error).splitlines()[0][:200]}
                del readers[name]
                gc.collect()
    for name, reader in readers.items():
        found[name]["state"] = reader.state_bytes()
    decode_in_turns(readers, found, request["turns"], request["decoded"])
    return found


def decode_in_turns(readers, found, turns, tokens):
    """Decode alternately; models with a growing state decode an eighth of the tokens."""
    each = dict.fromkeys(readers, tokens // turns)
    each |= {name: max(1, n // 8) for name, n in each.items() if readers[name].peer.grows}
    for name, reader in readers.items():
        reader.prepare_decoding(turns * each[name])
    for _ in range(turns):
        for name, reader in readers.items():
            found[name]["decoding"] += reader.decode(each[name])


CHILDREN = {"trial": trial, "memory": memory, "times": times}


class Run:
    """The parent process, which starts measurements and collects results."""

    def __init__(self, args):
        self.args, self.result = args, {"rows": [], "tables": {}, "by length": {}}
        self.names, self.tiny = list(PEERS), args.size == "tiny"
        self.seconds = {}  # model -> (tokens, seconds) of the longest prefill

    def ask(self, kind, trim_heap=False, **request):
        how = [kind, self.args.device, self.args.threads, self.tiny]
        return run_in_subprocess(
            __file__, [*how, request | {"size": self.args.size}], trim_heap=trim_heap
        )

    def choose_pieces(self):
        """Choose the fastest piece length of each model."""
        on_cuda = self.args.device.startswith("cuda")
        pieces = [1024, 4096, 16384] if on_cuda else [512, 1024, 4096]
        pieces = [8, 16] if self.tiny else pieces
        tokens = max(pieces)
        tried = self.ask("trial", names=self.names, tokens=tokens, pieces=pieces)
        if "failed" in tried:
            raise RuntimeError(f"the trial of pieces: {tried['failed']}")
        best = {name: min(seconds, key=seconds.get) for name, seconds in tried.items()}
        self.pieces = {name: None if b == "one call" else int(b) for name, b in best.items()}
        self.seconds = {name: (tokens, min(each.values())) for name, each in tried.items()}
        self.result["trial"] = {"tokens": tokens, "seconds by piece": tried}
        self.result["tables"]["models"] = [self.describe(name) for name in self.names]

    def describe(self, name):
        config, peer = matched_config(name, self.args.size), PEERS[name]
        number, target = parameters(config), parameters(melodi_config(self.args.size))
        width = getattr(config, "intermediate_size", None) if peer.matched != "layers" else None
        if name == "RecurrentGemma":
            width //= 2  # includes both halves of the gate
        return {
            "model": name,
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "feed-forward width": width,
            "parameters": number,
            "beside MELODI's": round(number / target, 3),
            "tokens of a call": self.pieces[name] or "all",
        }

    def expected(self, name, tokens):
        """Estimate the seconds of a prefill from the last one, with quadratic growth."""
        before, seconds = self.seconds[name]
        return seconds * (tokens / before) ** (2 if PEERS[name].grows else 1)

    def measure(self, tokens, rounds):
        """Measure all rows of a length."""
        late = {n: self.expected(n, tokens) for n in self.names}
        late = {name: seconds for name, seconds in late.items() if seconds > self.args.limit}
        pieces = {name: self.pieces[name] for name in self.names if name not in late}
        window = melodi_config(self.args.size).window_length
        how = {"rounds": rounds, "decoded": window, "turns": min(16, window)}
        found = self.ask("times", tokens=tokens, pieces=pieces, **how)
        self.result["by length"][tokens] = found
        if "failed" in found:
            found = dict.fromkeys(pieces, found)
        for name in self.names:
            row = {"model": name, "tokens": tokens}
            if name in late:
                row["not measured"] = f"too long: {late[name]:.0f} s expected"
            elif "failed" in found[name]:
                row["not measured"] = found[name]["failed"]
            else:
                row |= self.metrics(name, tokens, found[name])
            self.result["rows"].append(row)
            self.result["tables"]["ratios"] = self.ratios()
            write_json(self.result, self.args.output)  # the next ones are slow

    def metrics(self, name, tokens, found):
        piece, seconds = self.pieces[name], statistics.median(found["prefill"])
        self.seconds[name] = tokens, seconds
        result = self.ask("memory", trim_heap=True, name=name, tokens=tokens, piece=piece)
        row = {"prefill, s": round(seconds, 3), "tokens/s": round(tokens / seconds)}
        row |= {"state, bytes": found["state"]}
        row |= {"decoding, ms": round(1e3 * statistics.fmean(found["decoding"]), 3)}
        if "failed" in result:
            return row | {"not measured": f"peak: {result['failed']}"}
        return row | {"peak MB": round(result["peak"] / 1e6, 1)}

    def ratios(self):
        """Return Llama's costs divided by MELODI's."""
        at = {(row["model"], row["tokens"]): row for row in self.result["rows"]}
        rows = []
        for tokens in self.args.lengths:
            ours, theirs = at.get(("MELODI", tokens), {}), at.get(("Llama", tokens), {})
            row = {"tokens": tokens}
            for name in ("prefill, s", "peak MB", "state, bytes", "decoding, ms"):
                known = name in theirs and ours.get(name, 0) > 0
                ratio = round(theirs[name] / ours[name], 2) if known else None
                row[name.partition(",")[0].removesuffix(" MB")] = ratio
            rows.append(row)
        return rows

    def all(self):
        args = self.args
        self.result |= {"size": args.size, "config": config_sizes(melodi_config(args.size))}
        self.result |= Machine(args.device, args.threads, self.tiny).describe()
        kernels = ("mamba_ssm", "causal_conv1d")
        self.result["kernels"] = {
            name: importlib.util.find_spec(name) is not None for name in kernels
        }
        self.choose_pieces()
        rounds = args.rounds + args.rounds[-1:] * len(args.lengths)
        lengths = list(zip(args.lengths, rounds, strict=False))
        for tokens, count in tqdm(lengths, desc="lengths", unit="length"):
            self.measure(tokens, count)
        return self.result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["small", "paper"], default="small")
    parser.add_argument("--lengths", type=positive_int, nargs="+", help="tokens")
    parser.add_argument(
        "--rounds", type=positive_int, nargs="+", default=[3, 3, 1], help="by length"
    )
    parser.add_argument(
        "--limit", type=positive_float, default=180, help="maximum seconds of a prefill"
    )
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--threads", type=positive_int, default=1, help="1: CPU seconds; else wall")
    parser.add_argument("--output", type=output_file, default="benchmarks/results/peers.json")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a smoke test")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, device, threads, tiny, request = json.loads(args.child)
        print(json.dumps(CHILDREN[kind](request, Machine(device, threads, tiny))))
        return
    args.size = "tiny" if args.tiny else args.size
    args.lengths = args.lengths or LENGTHS[args.size]
    machine = Machine(args.device, args.threads, args.tiny)
    print_device(machine.device, machine.dtype)
    print(json.dumps(Run(args).all()["rows"], indent=1))


if __name__ == "__main__":
    main()
