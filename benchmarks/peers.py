"""MELODI beside a Llama, a sliding window, RecurrentGemma and Mamba2 of its size: cost and length.

    python benchmarks/peers.py [--size small] [--lengths 4096 ... 262144] [--rounds 3 3 1]
        [--limit 180] [--threads 1] [--device cpu] [--output benchmarks/results/peers.json] [--tiny]
    python benchmarks/peers.py --size paper --device cuda

One row is read; `benchmarks/parts/peer_models.py` tells how the models are matched.

Prefill gives the last logits only. Each peer reads in the way that is fastest for it: in pieces of
the length that took least in a trial beforehand, Llama also in one call, for which torch has a
causal kernel. Llama decodes from a `StaticCache`, since a `DynamicCache` is copied at each token.
(RecurrentGemma's convolution does not look back beyond a piece in transformers; that changes what
it computes, not what that costs.)

    seconds    of one process per length, which holds all models and lets them read in turn, round
               by round; decoding is one window of tokens in turns, Llama fewer, the mean of all
    memory     the peak of a prefill above the loaded model, one process each
    state      bytes of all tensors that are held from one token to the next

What would take longer than the limit for one prefill is recorded as too long, what needs more
memory than there is as failed.
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

from benchmarks.parts.floor import Machine, in_a_process_of_its_own, write  # before torch
from benchmarks.parts.peer_models import (
    LENGTHS,
    PEERS,
    Reader,
    matched_config,
    melodi_config,
    parameters,
    recorded,
)
from melodi_hf.evaluation.command_line import (
    device_name,
    output_file,
    positive_float,
    positive_int,
    print_device,
)

# What runs in processes of their own.


def trial(request, machine):
    """Seconds by the length of a piece, model by model; after a first reading to warm up."""
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
    """The peak of one prefill above the loaded model."""
    reader = Reader(request["name"], request["size"], machine)
    ids = reader.draw(request["tokens"])
    reader.prefill(ids[:, :64], None)
    reader.forget()
    before = machine.forget_peak()
    reader.prefill(ids, request["piece"])
    return {"peak": machine.peak() - before}


def times(request, machine):
    """Seconds of each round's prefill and of each token decoded, and the bytes held between, model
    by model; or why one failed."""
    readers, found = {}, {}
    for name in request["pieces"]:
        readers[name] = Reader(name, request["size"], machine)
        ids = readers[name].draw(request["tokens"])
        readers[name].prefill(ids[:, :1024], 512)  # buffers are allocated, kernels chosen
        found[name] = {"prefill": [], "decoding": []}
    for _ in range(request["rounds"]):
        for name, reader in list(readers.items()):
            try:
                found[name]["prefill"].append(reader.prefill(ids, request["pieces"][name]))
            except (RuntimeError, MemoryError) as error:  # not enough memory: the others go on
                found[name] = {"failed": str(error).splitlines()[0][:200]}
                del readers[name]
                gc.collect()
    for name, reader in readers.items():
        found[name]["state"] = reader.state_bytes()
    decode_in_turns(readers, found, request["turns"], request["decoded"])
    return found


def decode_in_turns(readers, found, turns, tokens):
    """Of models whose state grows an eighth of the tokens, which take longest."""
    each = dict.fromkeys(readers, tokens // turns)
    each |= {name: max(1, n // 8) for name, n in each.items() if readers[name].peer.grows}
    for name, reader in readers.items():
        reader.prepare_decoding(turns * each[name])
    for _ in range(turns):
        for name, reader in readers.items():
            found[name]["decoding"] += reader.decode(each[name])


CHILDREN = {"trial": trial, "memory": memory, "times": times}


class Run:
    """The parent: asks for one measurement after the other and keeps what came back."""

    def __init__(self, args):
        self.args, self.result = args, {"rows": [], "tables": {}, "by length": {}}
        self.names, self.tiny = list(PEERS), args.size == "tiny"
        self.seconds = {}  # model -> (tokens, seconds) of the longest prefill so far

    def ask(self, kind, lean=False, **request):
        how = [kind, self.args.device, self.args.threads, self.tiny]
        return in_a_process_of_its_own(
            __file__, [*how, request | {"size": self.args.size}], lean=lean
        )

    def choose_pieces(self):
        """The fastest way to read of each model."""
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
        self.result["tables"]["models"] = [self.described(name) for name in self.names]

    def described(self, name):
        config, peer = matched_config(name, self.args.size), PEERS[name]
        number, target = parameters(config), parameters(melodi_config(self.args.size))
        width = getattr(config, "intermediate_size", None) if peer.matched != "layers" else None
        if name == "RecurrentGemma":
            width //= 2  # transformers counts both halves of the gate
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
        """Seconds of a prefill, from the last one: the cost per token at most grows as they do."""
        before, seconds = self.seconds[name]
        return seconds * (tokens / before) ** (2 if PEERS[name].grows else 1)

    def measure(self, tokens, rounds):
        """All rows of a length."""
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
                row |= self.figures(name, tokens, found[name])
            self.result["rows"].append(row)
            self.result["tables"]["ratios"] = self.ratios()
            write(self.result, self.args.output)  # the next ones take long

    def figures(self, name, tokens, found):
        piece, seconds = self.pieces[name], statistics.median(found["prefill"])
        self.seconds[name] = tokens, seconds
        held = self.ask("memory", lean=True, name=name, tokens=tokens, piece=piece)
        row = {"prefill, s": round(seconds, 3), "tokens/s": round(tokens / seconds)}
        row |= {"state, bytes": found["state"]}
        row |= {"decoding, ms": round(1e3 * statistics.fmean(found["decoding"]), 3)}
        if "failed" in held:
            return row | {"not measured": f"peak: {held['failed']}"}
        return row | {"peak MB": round(held["peak"] / 1e6, 1)}

    def ratios(self):
        """Llama's costs over MELODI's, where both were measured."""
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
        self.result |= {"size": args.size, "config": recorded(melodi_config(args.size))}
        self.result |= Machine(args.device, args.threads, self.tiny).described()
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
    parser.add_argument("--limit", type=positive_float, default=180, help="seconds of one prefill")
    parser.add_argument("--device", type=device_name, default="cpu")
    parser.add_argument("--threads", type=positive_int, default=1, help="1: CPU seconds; else wall")
    parser.add_argument("--output", type=output_file, default="benchmarks/results/peers.json")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
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
