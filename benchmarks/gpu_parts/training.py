"""Measure training: float32 weights, bfloat16 autocast, fused AdamW, memory carried.

training            batches as large as they fit, with the logits of all tokens and without; no
                    dropout, here and below
training_dropout    the configuration's dropout; and gradient checkpointing of every layer
compiled_layers     torch.compile of each layer
compiled_model      torch.compile of the whole model
"""

import statistics
import time

import torch

from .bench import first_line, with_goal

GOAL = 0.45  # relative to the matmul rate


class Training:
    """A model and its optimizer, timed at several batch sizes."""

    def __init__(self, bench, **changes):
        self.bench, self.model = bench, bench.model(**changes).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=bench.is_cuda)
        self.tried = []

    def step(self, ids, memory, skip_logits):
        """Make one update; return the memory for the next segment."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.bench.device.type, torch.bfloat16):
            output = self.model(
                ids,
                labels=ids,
                memory=memory,
                return_memory=True,
                use_cache=False,
                skip_logits=skip_logits,
            )
        output.loss.backward()
        self.optimizer.step()
        return output.memory

    def step_seconds(self, batch, skip_logits):
        """Return the seconds of each step after warm-up."""
        ids, memory = self.bench.ids(batch, self.bench.sizes.segment), None
        times = []
        for _ in range(2 + self.bench.sizes.steps):
            start = self.bench.now()
            memory = self.step(ids, memory, skip_logits)
            times.append(self.bench.now() - start)
        return times[2:]

    def attempt(self, batch, skip_logits=True, **described):
        """Measure a batch size; record metrics or the error."""
        self.bench.free()
        start = time.perf_counter()
        row = {"batch": batch, "logits": "not kept" if skip_logits else "all"} | described
        try:
            seconds = statistics.median(self.step_seconds(batch, skip_logits))
        except RuntimeError as error:  # includes torch.OutOfMemoryError and cuBLAS errors
            row["failed"] = first_line(error)
        else:
            row |= self.metrics(batch, seconds)
        self.model.zero_grad(set_to_none=True)
        row["seconds of the attempt"] = time.perf_counter() - start
        self.tried.append(row)
        return row

    def metrics(self, batch, seconds):
        segment = self.bench.sizes.segment
        flops = batch * self.model.config.training_flops(segment)
        return {
            "tokens/s": batch * segment / seconds,
            "ms per step": seconds * 1e3,
            "TFLOP/s": flops / seconds / 1e12,
            "utilisation": self.bench.share(flops, seconds, "matmul TFLOP/s"),
            "peak GiB": self.bench.peak_gib(),
        }

    def best(self):
        """Return the attempt with the most tokens per second; None if all failed."""
        done = [row for row in self.tried if "failed" not in row]
        return max(done, key=lambda row: row["tokens/s"], default=None)

    def has_time_for(self, batch):
        """Tell whether another attempt is likely to finish in time."""
        if not self.tried:
            return True
        last = self.tried[-1]
        return self.bench.left() > 1.5 * last["seconds of the attempt"] * batch / last["batch"]


def training(bench, found):
    """Measure eager training at every batch size, with and without all logits."""
    run = Training(bench)
    found["rows"] = run.tried
    for skip_logits in (True, False):
        for batch in bench.sizes.batches:
            if run.has_time_for(batch):
                run.attempt(batch, skip_logits)
                record_best(found, run)
    require_success(run)
    run.step(bench.ids(1, bench.sizes.segment), None, True)  # creates gradients
    found["AdamW alone, ms"] = bench.median_seconds(run.optimizer.step) * 1e3


def record_best(found, run):
    """Record the best attempt and the target."""
    best = run.best()
    if best is not None:
        found["best"] = best
        found["best utilisation"] = with_goal(best["utilisation"], GOAL)


def require_success(run):
    """Raise if every attempt failed."""
    if run.best() is None:
        raise RuntimeError(run.tried[-1]["failed"])


def training_dropout(bench, found):
    """Measure gradient checkpointing at the largest batch, then the paper's dropout."""
    run = Training(bench)
    found["rows"] = run.tried
    recompute(run.model)
    run.attempt(bench.sizes.batches[-1], layers="recomputed in backward")
    del run
    run = Training(bench, dropout=0.05, attention_dropout=0.05)
    for batch in bench.sizes.batches[:2]:
        if run.has_time_for(batch):
            found["rows"].append(run.attempt(batch, dropout=0.05))


def recompute(model):
    """Enable gradient checkpointing; newer versions of transformers renamed the method."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


def compiled_layers(bench, found):
    """Compile each layer."""

    def compile_layers(model):
        for layer in model.model.layers:
            layer.compile(backend=bench.sizes.compile_backend, dynamic=False)

    compiled(bench, found, compile_layers)


def compiled_model(bench, found):
    """Compile the whole model, with all logits."""
    backend = bench.sizes.compile_backend
    compiled(bench, found, lambda model: model.compile(backend=backend, dynamic=False))


def compiled(bench, found, compile_it):
    """Measure compiled training at the fastest eager batch size."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    without = bench.results.get("training", {}).get("best") or {"batch": bench.sizes.batches[0]}
    found["without"] = without
    run = Training(bench)
    compile_it(run.model)
    first = run.attempt(without["batch"])
    found["seconds with compilation"] = first["seconds of the attempt"]
    found["graph breaks"] = sum(counters["graph_break"].values())
    found["graphs"] = counters["stats"]["unique_graphs"]
    record_best(found, run)
    require_success(run)
