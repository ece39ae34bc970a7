"""Reading a long document of one row: bfloat16 weights, a cache, the last logits only.

prefill   in pieces of several lengths, layer by layer, as a wavefront, and layer by layer as a
          CUDA graph that is captured for one piece and replayed for each
peers     MELODI beside a Llama and a sliding window of its size (`benchmarks/peers.py`); the
          recurrent ones at the shortest length alone, if time is left: without their own
          kernels they are slow
latency   a token after 4 000 tokens were read and after 1 000 000 (`benchmarks/speed.py`)
"""

import statistics

import torch

from benchmarks import peers as peers_script
from benchmarks import speed
from benchmarks.parts.floor import Machine
from melodi_hf import MelodiCache
from melodi_hf.models.costs import forward_flops

from .bench import beside_goal, captured, noted, one_line

SCHEDULES = ("layers", "wavefront", "layers, CUDA graph", "wavefront, CUDA graph")
FASTER = 3.0  # times, a wavefront than layer by layer
NAMES = ("MELODI", "Llama", "sliding window")
SLOW = ("RecurrentGemma", "Mamba2")
TURNS, DECODED = 4, 32  # of the peers


def read(model, cache, ids, piece):
    """The logits of the last token."""
    for part in ids.split(piece, dim=1):
        logits = model(part, cache=cache, logits_to_keep=1).logits
    return logits


class ReplayedPiece:
    """A piece of whole windows, read from a memory in place: each run goes on with the document.

    The memory stays in the tensors that the first piece left it in, which a graph needs.
    """

    def __init__(self, model, tokens):
        self.model, self.cache = model, MelodiCache(model.config)
        self.ids = torch.ones(1, tokens, dtype=torch.long, device=model.device)
        read(model, self.cache, self.ids, tokens)
        self.held = [dict(vars(layer)) for layer in self.cache.layers]

    def run(self):
        """Read what `ids` holds."""
        for layer, held in zip(self.cache.layers, self.held, strict=True):
            vars(layer).update(held)
        self.logits = read(self.model, self.cache, self.ids, self.ids.shape[1])
        for layer, held in zip(self.cache.layers, self.held, strict=True):
            for old, new in zip(held["memory"], layer.memory, strict=True):
                if new is not old:
                    old.copy_(new)
        held["progress"].tokens_read.copy_(layer.progress.tokens_read)  # all layers hold one

    def begin(self):
        """Empty the memory, in place."""
        for held in self.held:
            for tensor in (*held["memory"], held["progress"].tokens_read):
                tensor.zero_()


@torch.inference_mode()
def prefill(bench, found):
    """Every length of a piece under every schedule."""
    model, ids = bench.model().to(torch.bfloat16).eval(), bench.ids(1, bench.sizes.document)
    rows = found["rows"] = []
    for piece in bench.sizes.pieces:
        for schedule in SCHEDULES:
            bench.free()
            row = {"piece": piece, "schedule": schedule}
            rows.append(row)
            model.config.schedule = schedule.partition(",")[0]
            with noted(row):
                way = read_replayed if "graph" in schedule else read_eagerly
                way(bench, model, ids, piece, row)
            compare(found)


def read_eagerly(bench, model, ids, piece, row):
    read(model, MelodiCache(model.config), ids[:, :piece], piece)

    def work():
        row["memory bytes"] = read_anew(model, ids, piece)

    time_document(bench, model, ids, work, row)


def read_anew(model, ids, piece):
    cache = MelodiCache(model.config)
    read(model, cache, ids, piece)
    return cache.memory_bytes()


def read_replayed(bench, model, ids, piece, row):
    if not bench.is_cuda:
        row["note"] = "no CUDA: run as it is, without a graph"
    one = ReplayedPiece(model, piece)
    replay = captured(one.run) if bench.is_cuda else one.run

    def work():
        one.begin()
        for part in ids.split(piece, dim=1):
            one.ids.copy_(part)
            replay()

    time_document(bench, model, ids, work, row)
    exact = read(model, MelodiCache(model.config), ids, piece)
    gap = (one.logits.float() - exact.float()).abs().max() / exact.float().abs().max()
    row["relative difference from eager"] = gap.item()


def time_document(bench, model, ids, work, row, rounds=3):
    tokens = ids.shape[1]
    seconds = statistics.median(bench.seconds(work) for _ in range(rounds))
    flops = forward_flops(model.config, tokens, with_logits=False)
    row |= {
        "tokens/s": tokens / seconds,
        "ms": 1e3 * seconds,
        "share of the matmul rate": bench.share(flops, seconds, "matmul TFLOP/s"),
        "peak GiB": bench.peak_gib(),
    }


def compare(found):
    """The best of each schedule so far, and how they compare."""
    best = {}
    for row in found["rows"]:
        if "ms" in row:
            name = row["schedule"]
            best[name] = min(row["ms"], best.get(name, row["ms"]))
    found["best, ms"] = best
    wave = best.get("wavefront")
    for name in best.keys() - {"wavefront"} if wave else ():
        found[f"{name} / wavefront"] = best[name] / wave
    found["wavefront is faster, times"] = beside_goal(found.get("layers / wavefront"), FASTER)


def peers(bench, found):
    """Length by length, as far as time goes."""
    machine = Machine(bench.device.type, hasty=not bench.is_cuda)
    lengths, rows, took = bench.sizes.peer_lengths, [], 0.0
    found["rows"] = rows
    for tokens in lengths:
        if bench.left() > 3 * took:  # the next is four times as long, but not all of it grows
            took = bench.seconds(lambda n=tokens: rows.extend(peer_rows(bench, machine, NAMES, n)))
    for name in SLOW:
        rows.extend(peer_rows(bench, machine, [name], lengths[0]))


def peer_rows(bench, machine, names, tokens):
    """A row for each; Llama reads in one call, for which torch has a causal kernel."""
    bench.free()
    request = {
        "size": bench.sizes.peers,
        "tokens": tokens,
        "pieces": {name: None if name == "Llama" else min(tokens, 4096) for name in names},
        "rounds": 2,
        "turns": TURNS,
        "decoded": DECODED,
    }
    try:
        by_name = peers_script.times(request, machine)
    except Exception as error:
        by_name = {name: {"failed": one_line(error)} for name in names}
    return [peer_row(name, tokens, by_name[name]) for name in names]


def peer_row(name, tokens, told):
    row = {"model": name, "tokens": tokens}
    if "failed" in told:
        return row | {"failed": told["failed"]}
    return row | {
        "prefill, s": min(told["prefill"]),
        "decoding, ms": 1e3 * statistics.median(told["decoding"]),
        "state, bytes": told["state"],
    }


def latency(bench, found):
    """The states are set: to read a million tokens would take longer than the part may."""
    machine = Machine(bench.device.type, hasty=not bench.is_cuda)
    model = speed.build(bench.config(), machine)
    with torch.inference_mode():
        caches = speed.set_caches(model, bench.sizes.documents, machine)
        times = speed.compare(model, caches, min(128, model.config.window_length), machine)
    found |= speed.latency_row("the suite's", bench.sizes.documents, "set", times)
