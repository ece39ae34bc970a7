"""Shared by the parts of the suite: sizes, device, timing, time limits and targets."""

import gc
import signal
import statistics
import time
from contextlib import contextmanager
from typing import NamedTuple

import torch

from melodi_hf import MelodiConfig, MelodiForCausalLM

GIB = 1 << 30
ROUNDS = 7  # measurements per rate; the median is used


class Sizes(NamedTuple):
    """Sizes of models and measurements."""

    config: dict
    segment: int  # tokens
    batches: tuple[int, ...]  # of training
    steps: int  # timed training steps
    matmul_size: int
    matmul_dtype: torch.dtype
    copied_bytes: int
    document: int  # tokens
    pieces: tuple[int, ...]  # tokens of a call, whole windows
    decoded: int  # tokens, during which a window is completed
    decoded_after: tuple[int, ...]  # tokens read
    decoded_batches: tuple[int, ...]
    documents: tuple[int, int]  # tokens read before latencies are compared
    compile_backend: str
    cells: tuple[tuple[int, ...], ...]  # of attention: rows, heads, queries, keys, channels
    peers: str  # size of the peers' models
    peer_lengths: tuple[int, ...]  # tokens


FULL = Sizes(
    config={},  # the defaults: 12 layers of 1024 channels
    segment=4096,
    batches=(8, 16, 32),
    steps=3,
    matmul_size=8192,
    matmul_dtype=torch.bfloat16,
    copied_bytes=4 * GIB,
    document=65536,
    pieces=(4096, 16384, 65536),
    decoded=64,
    decoded_after=(4096, 65536),
    decoded_batches=(1, 16),
    documents=(4_000, 1_000_000),
    compile_backend="inductor",
    cells=((8, 16, 640, 768, 64), (32, 16, 640, 768, 64), (16, 8, 640, 768, 128)),
    peers="paper",
    peer_lengths=(1 << 12, 1 << 14, 1 << 16, 1 << 18),
)
TINY = Sizes(
    config={
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "window_length": 16,
        "num_summary_tokens": 4,
        "num_short_memory_tokens": 4,
        "long_memory_layers": (1,),
        "num_long_memory_tokens": 2,
        "long_memory_windows": 4,
    },
    segment=32,
    batches=(1, 2),
    steps=2,
    matmul_size=128,
    matmul_dtype=torch.float32,
    copied_bytes=1 << 20,
    document=128,
    pieces=(32, 64),
    decoded=20,
    decoded_after=(32, 64),
    decoded_batches=(1, 2),
    documents=(40, 1000),
    compile_backend="eager",
    cells=((2, 2, 20, 24, 16),),
    peers="tiny",
    peer_lengths=(32, 64),
)


class OutOfTime(BaseException):
    """Not an `Exception`, so that `except Exception` does not catch it."""


class Bench:
    """The device, the sizes, the results so far, and the remaining time."""

    def __init__(self, sizes, seconds):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.is_cuda = self.device.type == "cuda"
        self.sizes, self.results = sizes, {}
        self.end = self.part_end = time.perf_counter() + seconds

    def left(self):
        """Return the seconds left for the current part."""
        return self.part_end - time.perf_counter()

    def now(self):
        """Synchronize and return the time."""
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work):
        start = self.now()
        work()
        return self.now() - start

    def median_seconds(self, work, rounds=ROUNDS):
        """Return the median seconds after two warm-up rounds."""
        for _ in range(2):
            work()
        return statistics.median(self.seconds(work) for _ in range(rounds))

    def free(self):
        """Free cached memory and reset the peak."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self):
        """Return the peak memory of tensors since `free`; None on a CPU."""
        return torch.cuda.max_memory_allocated() / GIB if self.is_cuda else None

    def rate(self, name):
        """Return a rate per second measured by the part `rates`; None if it was not run."""
        rate = self.results.get("rates", {}).get(name)
        return None if rate is None else rate * (1e12 if name.startswith("matmul") else 1e9)

    def share(self, amount, seconds, name):
        """Return `amount` / `seconds` relative to a rate; None if the rate is unknown."""
        rate = self.rate(name)
        return None if rate is None else amount / seconds / rate

    def config(self, **changes):
        """Make a configuration, without dropout by default."""
        return MelodiConfig(
            **{"dropout": 0.0, "attention_dropout": 0.0} | self.sizes.config | changes
        )

    def model(self, **changes):
        """Make the same random model at each call, on the device."""
        torch.manual_seed(0)
        with self.device:
            return MelodiForCausalLM(self.config(**changes))

    def ids(self, batch, tokens):
        return torch.randint(1, self.config().vocab_size, (batch, tokens), device=self.device)

    @contextmanager
    def limited_to(self, seconds):
        """Raise `OutOfTime` inside after some seconds."""

        def stop(*_):
            raise OutOfTime

        self.part_end = min(self.end, time.perf_counter() + seconds)
        previous = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(self.left(), 0.001))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


def capture_graph(work):
    """Capture `work` as a CUDA graph and return the function that replays it.

    The graph uses the tensors of the capture: the caller must keep them alive.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries choose kernels and allocate workspaces here
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def with_goal(value, goal, at_most=False):
    """Return a value, its target (minimum, or maximum if `at_most`), and whether it is reached."""
    reached = None if value is None else value <= goal if at_most else value >= goal
    return {"reached": reached, "value": value, "goal": goal}


def first_line(error):
    """Return the first line of an error."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


@contextmanager
def record_error(row):
    """Record an exception in the row and continue."""
    try:
        yield
    except Exception as error:
        row["failed"] = first_line(error)
