"""Measure greedy decoding with bfloat16 weights, synchronized after each token.

    decoding_agrees    in float32 with few layers: `generate` with a static cache, which is
                       compiled, and the steps of `decoding_replayed` give eager decoding's tokens
    decoding           eager, after short and long documents; and slots that are used again
    decoding_replayed  one CUDA graph for tokens in the middle of a window; its first and last
                       token run eagerly, since they have extra work. As it is, and fully compiled
    decoding_compiled  `generate(cache_implementation="static")` as called by users, with the same
                       division

A compiled graph cannot branch in Python on the slot of a row, so a graph for all slots would need
`torch.cond` in every layer. torch does not use CUDA graphs for a graph with such a branch
(`cudagraph_skips`), and synchronizes at each branch.
"""

import statistics

import torch
from transformers import CompileConfig
from transformers.cache_utils import StaticCache

from melodi_hf import MelodiCache
from melodi_hf.models.cache import mid_window, shared_state

from .bench import capture_graph, record_error, with_goal
from .reading import read

GOAL = 0.6  # relative to the copy rate


class StaticDecoder:
    """Greedy decoding with a static cache, all rows at the same slot."""

    def __init__(self, bench, model, ids):
        self.bench, self.model, self.read = bench, model, ids.shape[1]
        self.cache = StaticCache(config=model.config, max_cache_len=self.read + 1)
        self.logits = read(model, self.cache, ids, bench.sizes.segment)
        self.token = self.logits.argmax(-1)
        self.mid_window_step = self.eager_mid_window_step

    def step(self, model=None):
        """Decode the next token in place."""
        model = self.model if model is None else model
        output = model(self.token, cache=self.cache, logits_to_keep=1)
        self.logits.copy_(output.logits)
        self.token.copy_(self.logits.argmax(-1))

    def eager_mid_window_step(self, model=None):
        with mid_window(self.cache):
            self.step(model)

    def is_window_edge(self):
        """Tell whether the next token is the first or last of a window."""
        window = self.model.config.window_length
        return self.read % window in (0, window - 1)

    def advance(self):
        self.step() if self.is_window_edge() else self.mid_window_step()
        self.read += 1

    def capture(self, model=None):
        """Capture the tokens in the middle of a window as a CUDA graph.

        Capturing runs some steps; the memory is restored afterwards.
        """
        if not self.bench.is_cuda:
            self.mid_window_step = lambda: self.eager_mid_window_step(model)
            return
        state = [tensor.clone() for tensor in self.tensors()]
        self.mid_window_step = capture_graph(lambda: self.eager_mid_window_step(model))
        for tensor, before in zip(self.tensors(), state, strict=True):
            tensor.copy_(before)

    def tensors(self):
        """Return all tensors that a step writes."""
        for layer in self.cache.layers:
            yield from layer.memory
        yield from shared_state(self.cache).tensors
        yield self.token

    def tokens(self, count):
        """Decode the next `count` tokens of each row (B count)."""
        made = []
        for _ in range(count):
            self.advance()
            made.append(self.token.clone())
        return torch.cat(made, dim=1)

    def seconds(self, count):
        """Return the seconds of each token, and of tokens that complete a window."""
        times, closing = [], []
        for _ in range(count):
            is_last = (self.read + 1) % self.model.config.window_length == 0
            times.append(self.bench.seconds(self.advance))
            closing += times[-1:] if is_last else []
        return times, closing

    def burst_seconds(self, count):
        """Return the seconds of a token in mid-window, without synchronization.

        `count` tokens are decoded, or as many as fit into the window.
        """
        window = self.model.config.window_length
        count = min(count, window - 1 - self.read % window)
        self.read += count

        def burst():
            for _ in range(count):
                self.mid_window_step()

        return self.bench.seconds(burst) / count


def prompt_length(bench):
    """Return a prompt length so that decoding passes the end of a window."""
    return bench.sizes.segment - bench.sizes.decoded // 2


@torch.no_grad()
def decoding_agrees(bench, found):
    """Count tokens that differ from eager decoding; none should."""
    model = bench.model(num_hidden_layers=2, long_memory_layers=(1,)).eval()
    ids, count = bench.ids(1, prompt_length(bench)), bench.sizes.decoded
    how = {"do_sample": False, "max_new_tokens": count}
    wanted = model.generate(ids, **how)
    torch.compiler.reset()
    compiled = model.generate(ids, **how, **static_cache_options(bench))
    found["compiled by transformers"] = (compiled != wanted).sum().item()
    stepping = StaticDecoder(bench, model, ids)
    first = stepping.token.clone()
    stepping.capture()
    replayed = torch.cat((first, stepping.tokens(count - 1)), dim=1)
    found["replayed"] = (replayed != wanted[:, ids.shape[1] :]).sum().item()
    found["all agree"] = found["compiled by transformers"] == found["replayed"] == 0


def static_cache_options(bench):
    """Return the arguments of `generate` for a static cache; a CPU must request compilation."""
    how = {"cache_implementation": "static"}
    if not bench.is_cuda:
        config = CompileConfig(backend=bench.sizes.compile_backend, mode=None)
        config._compile_all_devices = True
        how["compile_config"] = config
    return how


@torch.inference_mode()
def decoding(bench, found):
    """Measure time and memory of a token after documents of several lengths."""
    model = bench.model().to(torch.bfloat16).eval()
    rows = found["rows"] = []
    for batch in bench.sizes.decoded_batches:
        cache, read_so_far, memory_sizes = MelodiCache(model.config), 0, set()
        bench.free()
        for tokens in bench.sizes.decoded_after:
            until = tokens - bench.sizes.decoded // 2
            read(model, cache, bench.ids(batch, until - read_so_far), bench.sizes.segment)
            times = decode(model, cache, batch, bench)
            row = {"batch": batch, "tokens read": tokens, "memory bytes": cache.memory_bytes()}
            rows.append(row | decoding_metrics(bench, model.config, batch, times))
            memory_sizes.add(row["memory bytes"])
            read_so_far = cache.get_seq_length()
        found[f"memory bytes equal, batch {batch}"] = len(memory_sizes) == 1
    found["slots met again"] = repeated_slots(bench)


def repeated_slots(bench):
    """Time tokens at slots that are used for the first and for the second time.

    With masked empty slots the bias has four axes, and torch may use cuDNN, which builds a new plan
    for each number of keys.
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
    """Return the seconds of each token."""
    ids, times = bench.ids(batch, 1), []
    for _ in range(count or bench.sizes.decoded):
        start = bench.now()
        logits = model(ids, cache=cache, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        times.append(bench.now() - start)
    return times


def decoding_metrics(bench, config, batch, times):
    """Summarize the seconds of tokens of which one completes a window."""
    typical = statistics.median(times)
    return {
        "ms per token, median": typical * 1e3,
        "ms per token, mean": statistics.fmean(times) * 1e3,
        "ms of the slowest": max(times) * 1e3,
        "tokens/s": batch / statistics.fmean(times),
        "share of the bandwidth": bench.share(needed_bytes(config, batch), typical, COPY_RATE),
        "peak GiB": bench.peak_gib(),
    }


COPY_RATE = "copy GB/s, read and written"


def needed_bytes(config, batch):
    """Return the bytes that a step must read: the weights, and the memory of each row."""
    weights = config.weight_bytes(2)
    return weights + batch * (config.decoding_bytes(config.window_length // 2, 2) - weights)


@torch.no_grad()
def decoding_replayed(bench, found):
    """Measure eager kernels in a CUDA graph, then compiled ones."""
    model = bench.model().to(torch.bfloat16).eval()
    rows = found["rows"] = []
    torch.compiler.reset()
    for batch in bench.sizes.decoded_batches:
        for kind in ("as it is", "compiled"):
            row = {"kernels": kind, "batch": batch}
            rows.append(row)
            with record_error(row):
                replay(bench, model, batch, row)
            shares = [r.get("share of the bandwidth") for r in rows if r["batch"] == 1]
            best = max((share for share in shares if share is not None), default=None)
            found["share of the bandwidth at batch 1"] = with_goal(best, GOAL)


def replay(bench, model, batch, row):
    bench.free()
    stepping = StaticDecoder(bench, model, bench.ids(batch, prompt_length(bench)))
    step = None
    if row["kernels"] == "compiled":
        backend = bench.sizes.compile_backend
        step = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
        row["seconds with compilation"] = bench.seconds(
            lambda: stepping.eager_mid_window_step(step)
        )
        stepping.read += 1
    stepping.capture(step)
    times, closing = stepping.seconds(bench.sizes.decoded)
    row |= decoding_metrics(bench, model.config, batch, times)
    row["ms of the token that closes a window"] = closing[0] * 1e3 if closing else None
    needed = needed_bytes(model.config, batch)
    seconds = stepping.burst_seconds(bench.sizes.decoded // 4)
    row["ms per token, not waited for"] = seconds * 1e3
    row["share of the bandwidth, not waited for"] = bench.share(needed, seconds, COPY_RATE)


class Clock:
    """A streamer that records the time of each token."""

    def __init__(self, bench):
        self.bench, self.times = bench, []

    def put(self, value):
        self.times.append(self.bench.now())

    def end(self):
        """Do nothing; required of a streamer."""

    def seconds(self):
        """Return the seconds of each token except the first, which includes the prompt."""
        pairs = zip(self.times[1:], self.times[2:], strict=False)
        return [after - before for before, after in pairs]


@torch.no_grad()
def decoding_compiled(bench, found):
    """Measure `generate` with three layers first, then with all layers."""
    rows, layers = found.setdefault("rows", []), bench.config().num_hidden_layers
    for count in sorted({min(3, layers), layers}):
        took = rows[-1]["seconds of the first call"] if rows else 0.0
        if bench.left() < took * count / 3:
            return
        rows.append({"layers": count})
        generate_compiled(bench, rows[-1], num_hidden_layers=count, long_memory_layers=(1,))
    share = rows[-1]["share of the bandwidth"]  # of all layers
    found["share of the bandwidth at batch 1"] = with_goal(share, GOAL)


def generate_compiled(bench, row, **changes):
    """Generate twice from the same prompt; the first call includes compilation."""
    model = bench.model(**changes).to(torch.bfloat16).eval()
    ids, count = bench.ids(1, prompt_length(bench)), bench.sizes.decoded
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for call in ("first", "second"):
        start, clock = bench.now(), Clock(bench)
        how = {"do_sample": False, "max_new_tokens": count, "streamer": clock}
        model.generate(ids, **how, **static_cache_options(bench))
        row[f"seconds of the {call} call"] = bench.now() - start
        row["graphs"] = counters["stats"]["unique_graphs"]
        row["graph breaks"] = sum(counters["graph_break"].values())
        cudagraphs = {name: n for name, n in counters["inductor"].items() if "cudagraph" in name}
        row["of CUDA graphs"] = cudagraphs
    row |= decoding_metrics(bench, model.config, 1, clock.seconds())
