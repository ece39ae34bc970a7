"""Decoding: bfloat16 weights, greedy tokens, each waited for; a window closes amid them.

    decoding_agrees    in float32 with few layers: `generate` with a static cache, which is
                       compiled, and the steps of `decoding_replayed` give eager decoding's tokens
    decoding           eagerly, however much was read before; and slots that are met again
    decoding_replayed  one CUDA graph for the tokens within a window; the token that begins it and
                       the one that closes it run eagerly, since what they do besides happens once
                       in a window. As it is, and compiled whole
    decoding_compiled  `generate(cache_implementation="static")` as a user calls it, which keeps to
                       the same division

Inside a compiled graph nobody may look at a row's slot, so a step for any slot would decide by
`torch.cond` whether a window closes, in every layer; torch leaves a graph with such a branch out of
its CUDA graphs (`cudagraph_skips`), and asks the device for the answer each time.
"""

import statistics

import torch
from transformers import CompileConfig
from transformers.cache_utils import StaticCache

from melodi_hf import MelodiCache
from melodi_hf.models.cache import within_windows
from melodi_hf.models.costs import decoding_bytes, weight_bytes

from .bench import beside_goal, captured, noted
from .reading import read

GOAL = 0.6  # of the rate of copies


class Stepping:
    """Greedy tokens after a document, all rows at the same slot, in a static cache."""

    def __init__(self, bench, model, ids):
        self.bench, self.model, self.read = bench, model, ids.shape[1]
        self.cache = StaticCache(config=model.config, max_cache_len=self.read + 1)
        self.logits = read(model, self.cache, ids, bench.sizes.segment)
        self.token = self.logits.argmax(-1)
        self.within = self.open_step

    def step(self, model=None):
        """The next token, written over the last."""
        model = self.model if model is None else model
        output = model(self.token, cache=self.cache, logits_to_keep=1)
        self.logits.copy_(output.logits)
        self.token.copy_(self.logits.argmax(-1))

    def open_step(self, model=None):
        with within_windows(self.cache):
            self.step(model)

    def at_an_end(self):
        """Whether the next token begins or closes a window."""
        window = self.model.config.window_length
        return self.read % window in (0, window - 1)

    def advance(self):
        self.step() if self.at_an_end() else self.within()
        self.read += 1

    def capture(self, model=None):
        """From now on the tokens within a window are a CUDA graph. Capturing runs some of them: the
        memory is put back."""
        if not self.bench.is_cuda:
            self.within = lambda: self.open_step(model)
            return
        state = [tensor.clone() for tensor in self.tensors()]
        self.within = captured(lambda: self.open_step(model))
        for tensor, before in zip(self.tensors(), state, strict=True):
            tensor.copy_(before)

    def tensors(self):
        """All that a step writes."""
        for layer in self.cache.layers:
            yield from (*layer.memory, layer.progress.tokens_read)
            yield from (layer.recent, layer.output, layer.columns)
        yield self.token

    def tokens(self, count):
        """The next `count` of each row, B count."""
        made = []
        for _ in range(count):
            self.advance()
            made.append(self.token.clone())
        return torch.cat(made, dim=1)

    def seconds(self, count):
        """Of each token, and of the one that closed a window."""
        times, closing = [], []
        for _ in range(count):
            is_last = (self.read + 1) % self.model.config.window_length == 0
            times.append(self.bench.seconds(self.advance))
            closing += times[-1:] if is_last else []
        return times, closing

    def burst_seconds(self, count):
        """Of a token within a window, if nobody waits before all are done: `count` of them, or as
        many as the window has room for."""
        window = self.model.config.window_length
        count = min(count, window - 1 - self.read % window)
        self.read += count

        def burst():
            for _ in range(count):
                self.within()

        return self.bench.seconds(burst) / count


def before_closing(bench):
    """Tokens to read so that a window closes amid the tokens that are decoded then."""
    return bench.sizes.segment - bench.sizes.decoded // 2


@torch.no_grad()
def decoding_agrees(bench, found):
    """Tokens that differ from eager ones; there should be none."""
    model = bench.model(num_hidden_layers=2, long_memory_layers=(1,)).eval()
    ids, count = bench.ids(1, before_closing(bench)), bench.sizes.decoded
    how = {"do_sample": False, "max_new_tokens": count}
    wanted = model.generate(ids, **how)
    torch.compiler.reset()
    compiled = model.generate(ids, **how, **static(bench))
    found["compiled by transformers"] = (compiled != wanted).sum().item()
    stepping = Stepping(bench, model, ids)
    first = stepping.token.clone()
    stepping.capture()
    replayed = torch.cat((first, stepping.tokens(count - 1)), dim=1)
    found["replayed"] = (replayed != wanted[:, ids.shape[1] :]).sum().item()
    found["all agree"] = found["compiled by transformers"] == found["replayed"] == 0


def static(bench):
    """Arguments of `generate`; a CPU compiles only if it is told to, and without a compiler."""
    how = {"cache_implementation": "static"}
    if not bench.is_cuda:
        config = CompileConfig(backend=bench.sizes.compile_backend, mode=None)
        config._compile_all_devices = True
        how["compile_config"] = config
    return how


@torch.inference_mode()
def decoding(bench, found):
    """Time and memory of a token, however much was read before."""
    model = bench.model().to(torch.bfloat16).eval()
    rows = found["rows"] = []
    for batch in bench.sizes.decoded_batches:
        cache, read_so_far, held = MelodiCache(model.config), 0, set()
        bench.free()
        for tokens in bench.sizes.decoded_after:
            until = tokens - bench.sizes.decoded // 2
            read(model, cache, bench.ids(batch, until - read_so_far), bench.sizes.segment)
            times = decode(model, cache, batch, bench)
            row = {"batch": batch, "tokens read": tokens, "memory bytes": cache.memory_bytes()}
            rows.append(row | figures(bench, model.config, batch, times))
            held.add(row["memory bytes"])
            read_so_far = cache.get_seq_length()
        found[f"memory bytes equal, batch {batch}"] = len(held) == 1
    found["slots met again"] = met_again(bench)


def met_again(bench):
    """Tokens at slots that no token stood at before in this process, and in the next window.

    With empty slots hidden the bias has four axes, and torch may give it to cuDNN, which prepares
    itself anew for each number of keys.
    """
    model = bench.model(mask_empty_memory=True).to(torch.bfloat16).eval()
    cache, window, few = MelodiCache(model.config), model.config.window_length, 8
    read(model, cache, bench.ids(1, bench.sizes.segment), bench.sizes.segment)
    first = decode(model, cache, 1, bench, few)
    read(model, cache, bench.ids(1, window - few), window)
    again = decode(model, cache, 1, bench, few)
    named = {"ms of a token, first": first, "ms of a token, again": again}
    return {name: 1e3 * statistics.median(times[1:]) for name, times in named.items()}


def decode(model, cache, batch, bench, count=None):
    """Seconds of each token."""
    ids, times = bench.ids(batch, 1), []
    for _ in range(count or bench.sizes.decoded):
        start = bench.now()
        logits = model(ids, cache=cache, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        times.append(bench.now() - start)
    return times


def figures(bench, config, batch, times):
    """Of the seconds of tokens among which one closes a window."""
    typical = statistics.median(times)
    return {
        "ms per token, median": typical * 1e3,
        "ms per token, mean": statistics.fmean(times) * 1e3,
        "ms of the slowest": max(times) * 1e3,
        "tokens/s": batch / statistics.fmean(times),
        "share of the bandwidth": bench.share(needed_bytes(config, batch), typical, COPIES),
        "peak GiB": bench.peak_gib(),
    }


COPIES = "copy GB/s, read and written"


def needed_bytes(config, batch):
    """That a step must read amid a window, in bfloat16: weights once, the memory of each row."""
    weights = weight_bytes(config, 2)
    return weights + batch * (decoding_bytes(config, config.window_length // 2, 2) - weights)


@torch.no_grad()
def decoding_replayed(bench, found):
    """The same kernels as eagerly in one graph, then compiled ones."""
    model = bench.model().to(torch.bfloat16).eval()
    rows = found["rows"] = []
    torch.compiler.reset()
    for batch in bench.sizes.decoded_batches:
        for kind in ("as it is", "compiled"):
            row = {"kernels": kind, "batch": batch}
            rows.append(row)
            with noted(row):
                replay(bench, model, batch, row)
            shares = [r.get("share of the bandwidth") for r in rows if r["batch"] == 1]
            best = max((share for share in shares if share is not None), default=None)
            found["share of the bandwidth at batch 1"] = beside_goal(best, GOAL)


def replay(bench, model, batch, row):
    bench.free()
    stepping = Stepping(bench, model, bench.ids(batch, before_closing(bench)))
    step = None
    if row["kernels"] == "compiled":
        backend = bench.sizes.compile_backend
        step = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
        row["seconds with compilation"] = bench.seconds(lambda: stepping.open_step(step))
        stepping.read += 1
    stepping.capture(step)
    times, closing = stepping.seconds(bench.sizes.decoded)
    row |= figures(bench, model.config, batch, times)
    row["ms of the token that closes a window"] = closing[0] * 1e3 if closing else None
    needed = needed_bytes(model.config, batch)
    seconds = stepping.burst_seconds(bench.sizes.decoded // 4)
    row["ms per token, not waited for"] = seconds * 1e3
    row["share of the bandwidth, not waited for"] = bench.share(needed, seconds, COPIES)


class Clock:
    """A streamer that notes when it is given each token."""

    def __init__(self, bench):
        self.bench, self.times = bench, []

    def put(self, value):
        self.times.append(self.bench.now())

    def end(self):
        """Nothing is left to show."""

    def seconds(self):
        """Of each token but the first, which waits for the prompt."""
        pairs = zip(self.times[1:], self.times[2:], strict=False)
        return [after - before for before, after in pairs]


@torch.no_grad()
def decoding_compiled(bench, found):
    """With three layers first: what a layer does to compilation and to the graphs shows there."""
    rows, layers = found.setdefault("rows", []), bench.config().num_hidden_layers
    for count in sorted({min(3, layers), layers}):
        took = rows[-1]["seconds of the first call"] if rows else 0.0
        if bench.left() < took * count / 3:
            return
        rows.append({"layers": count})
        generate_compiled(bench, rows[-1], num_hidden_layers=count, long_memory_layers=(1,))
    share = rows[-1]["share of the bandwidth"]  # of all layers
    found["share of the bandwidth at batch 1"] = beside_goal(share, GOAL)


def generate_compiled(bench, row, **changes):
    """Twice the same prompt: compilation is in the first call."""
    model = bench.model(**changes).to(torch.bfloat16).eval()
    ids, count = bench.ids(1, before_closing(bench)), bench.sizes.decoded
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for call in ("first", "second"):
        start, clock = bench.now(), Clock(bench)
        how = {"do_sample": False, "max_new_tokens": count, "streamer": clock}
        model.generate(ids, **how, **static(bench))
        row[f"seconds of the {call} call"] = bench.now() - start
        row["graphs"] = counters["stats"]["unique_graphs"]
        row["graph breaks"] = sum(counters["graph_break"].values())
        told = {name: n for name, n in counters["inductor"].items() if "cudagraph" in name}
        row["of CUDA graphs"] = told
    row |= figures(bench, model.config, 1, clock.seconds())
