"""Measure reading of one long document: bfloat16 weights, a cache, the last logits only.

prefill   in pieces of several lengths, eagerly and as a CUDA graph that is captured for one piece
          and replayed for each
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
from melodi_hf.models.cache import shared_state

from .bench import capture_graph, first_line, record_error

WAYS = ("eager", "CUDA graph")  # of prefill
NAMES = ("MELODI", "Llama", "sliding window")
SLOW = ("RecurrentGemma", "Mamba2")
PEER_TURNS, DECODED = 4, 32  # of the other models


def read(model, cache, ids, piece):
    """Read ids in pieces and return the logits of the last token."""
    for part in ids.split(piece, dim=1):
        logits = model(part, cache=cache, logits_to_keep=1).logits
    return logits


class ReplayedPiece:
    """A captured call on complete windows that updates the memory in place.

    The memory stays in the tensors of the first call, as a CUDA graph requires.
    """

    def __init__(self, model, tokens):
        self.model, self.cache = model, MelodiCache(model.config)
        self.ids = torch.ones(1, tokens, dtype=torch.long, device=model.device)
        read(model, self.cache, self.ids, tokens)
        self.memories = [layer.memory for layer in self.cache.layers]
        self.shared = dict(vars(shared_state(self.cache)))  # by all layers

    def run(self):
        """Read the next piece from `ids`."""
        for layer, memory in zip(self.cache.layers, self.memories, strict=True):
            layer.memory = memory
        state = shared_state(self.cache)
        vars(state).update(self.shared)
        self.logits = read(self.model, self.cache, self.ids, self.ids.shape[1])
        for layer, memory in zip(self.cache.layers, self.memories, strict=True):
            for old, new in zip(memory, layer.memory, strict=True):
                if new is not old:
                    old.copy_(new)
        self.shared["progress"].tokens_read.copy_(state.progress.tokens_read)

    def reset(self):
        """Reset the memory in place."""
        tensors = [tensor for memory in self.memories for tensor in memory]
        for tensor in (*tensors, self.shared["progress"].tokens_read):
            tensor.zero_()


@torch.inference_mode()
def prefill(bench, found):
    """Read in pieces of every length, in both ways."""
    model, ids = bench.model().to(torch.bfloat16).eval(), bench.ids(1, bench.sizes.document)
    rows = found["rows"] = []
    for piece in bench.sizes.pieces:
        for way in WAYS:
            bench.free()
            row = {"piece": piece, "way": way}
            rows.append(row)
            with record_error(row):
                read_document = read_eagerly if way == "eager" else read_replayed
                read_document(bench, model, ids, piece, row)
            compare(found)


def read_eagerly(bench, model, ids, piece, row):
    read(model, MelodiCache(model.config), ids[:, :piece], piece)

    def work():
        row["memory bytes"] = read_from_empty(model, ids, piece)

    time_document(bench, model, ids, work, row)


def read_from_empty(model, ids, piece):
    cache = MelodiCache(model.config)
    read(model, cache, ids, piece)
    return cache.memory_bytes()


def read_replayed(bench, model, ids, piece, row):
    if not bench.is_cuda:
        row["note"] = "no CUDA: run as it is, without a graph"
    one = ReplayedPiece(model, piece)
    replay = capture_graph(one.run) if bench.is_cuda else one.run

    def work():
        one.reset()
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
    flops = model.config.forward_flops(tokens, with_logits=False)
    row |= {
        "tokens/s": tokens / seconds,
        "ms": 1e3 * seconds,
        "share of the matmul rate": bench.share(flops, seconds, "matmul TFLOP/s"),
        "peak GiB": bench.peak_gib(),
    }


def compare(found):
    """Compare the best of both ways so far."""
    best = {}
    for row in found["rows"]:
        if "ms" in row:
            name = row["way"]
            best[name] = min(row["ms"], best.get(name, row["ms"]))
    found["best, ms"] = best
    if len(best) == len(WAYS):
        found["eager / CUDA graph"] = best["eager"] / best["CUDA graph"]


def peers(bench, found):
    """Measure one length after another, as long as time permits."""
    machine = Machine(bench.device.type, quick=not bench.is_cuda)
    lengths, rows, took = bench.sizes.peer_lengths, [], 0.0
    found["rows"] = rows
    for tokens in lengths:
        if bench.left() > 3 * took:  # the next takes less than four times as long
            took = bench.seconds(lambda n=tokens: rows.extend(peer_rows(bench, machine, NAMES, n)))
    for name in SLOW:
        rows.extend(peer_rows(bench, machine, [name], lengths[0]))


def peer_rows(bench, machine, names, tokens):
    """Measure a row per model; Llama reads in one call, for torch's causal kernel."""
    bench.free()
    request = {
        "size": bench.sizes.peers,
        "tokens": tokens,
        "pieces": {name: None if name == "Llama" else min(tokens, 4096) for name in names},
        "rounds": 2,
        "turns": PEER_TURNS,
        "decoded": DECODED,
    }
    try:
        by_name = peers_script.times(request, machine)
    except Exception as error:
        by_name = {name: {"failed": first_line(error)} for name in names}
    return [peer_row(name, tokens, by_name[name]) for name in names]


def peer_row(name, tokens, result):
    row = {"model": name, "tokens": tokens}
    if "failed" in result:
        return row | {"failed": result["failed"]}
    return row | {
        "prefill, s": min(result["prefill"]),
        "decoding, ms": 1e3 * statistics.median(result["decoding"]),
        "state, bytes": result["state"],
    }


def latency(bench, found):
    """Compare latencies with set states, since reading a million tokens takes too long."""
    machine = Machine(bench.device.type, quick=not bench.is_cuda)
    model = speed.build(bench.config(), machine)
    with torch.inference_mode():
        caches = speed.set_caches(model, bench.sizes.documents, machine)
        times = speed.compare(model, caches, min(128, model.config.window_length), machine)
    found |= speed.latency_row("the suite's", bench.sizes.documents, "set", times)
