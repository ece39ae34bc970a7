"""Training: float32 weights, bfloat16 autocast, the fused AdamW step included, memory carried from
step to step. Utilisation is the FLOPs that must be done over (seconds * matmul rate).

    training            batches as large as they fit, with the logits of all tokens and without; no
                        dropout, here and below
    training_dropout    the configuration's own dropout; and every layer computed anew in backward
    training_schedules  few rows, layer by layer and as a wavefront
    compiled_layers     torch.compile, each layer by itself
    compiled_model      the whole model in one
"""

import statistics
import time

import torch

from melodi_hf.models.costs import training_flops

from .bench import beside_goal, one_line

GOAL = 0.45  # of the rate of matrix products


class Training:
    """A model and its optimizer, timed at one batch size after another."""

    def __init__(self, bench, **changes):
        self.bench, self.model = bench, bench.model(**changes).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=bench.is_cuda)
        self.tried = []

    def step(self, ids, memory, skip_logits):
        """One update -> the memory for the next segment."""
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
        """Of each step; those before them, which build and warm up, are left out."""
        ids, memory = self.bench.ids(batch, self.bench.sizes.segment), None
        times = []
        for _ in range(2 + self.bench.sizes.steps):
            start = self.bench.now()
            memory = self.step(ids, memory, skip_logits)
            times.append(self.bench.now() - start)
        return times[2:]

    def attempt(self, batch, skip_logits=True, **described):
        """The figures of a batch size, or why there are none."""
        self.bench.free()
        start = time.perf_counter()
        row = {"batch": batch, "logits": "not kept" if skip_logits else "all"} | described
        try:
            seconds = statistics.median(self.step_seconds(batch, skip_logits))
        except RuntimeError as error:  # torch.OutOfMemoryError is one, and so is cuBLAS's
            row["failed"] = one_line(error)
        else:
            row |= self.figures(batch, seconds)
        self.model.zero_grad(set_to_none=True)
        row["seconds of the attempt"] = time.perf_counter() - start
        self.tried.append(row)
        return row

    def figures(self, batch, seconds):
        segment = self.bench.sizes.segment
        flops = batch * training_flops(self.model.config, segment)
        return {
            "tokens/s": batch * segment / seconds,
            "ms per step": seconds * 1e3,
            "TFLOP/s": flops / seconds / 1e12,
            "utilisation": self.bench.share(flops, seconds, "matmul TFLOP/s"),
            "peak GiB": self.bench.peak_gib(),
        }

    def best(self):
        """The attempt with the most tokens per second; None if none succeeded."""
        done = [row for row in self.tried if "failed" not in row]
        return max(done, key=lambda row: row["tokens/s"], default=None)

    def has_time_for(self, batch):
        """Whether another attempt is likely to end before the part must."""
        if not self.tried:
            return True
        last = self.tried[-1]
        return self.bench.left() > 1.5 * last["seconds of the attempt"] * batch / last["batch"]


def training(bench, found):
    """Eagerly, at every batch, the loss with whole logits and without."""
    run = Training(bench)
    found["rows"] = run.tried
    for skip_logits in (True, False):
        for batch in bench.sizes.batches:
            if run.has_time_for(batch):
                run.attempt(batch, skip_logits)
                tell_best(found, run)
    require_one(run)
    run.step(bench.ids(1, bench.sizes.segment), None, True)  # gradients to step along
    found["AdamW alone, ms"] = bench.median_seconds(run.optimizer.step) * 1e3


def tell_best(found, run):
    """What is best so far, beside the goal."""
    best = run.best()
    if best is not None:
        found["best"] = best
        found["best utilisation"] = beside_goal(best["utilisation"], GOAL)


def require_one(run):
    """If every attempt failed, so did the part."""
    if run.best() is None:
        raise RuntimeError(run.tried[-1]["failed"])


def training_dropout(bench, found):
    """Recomputed layers at the largest batch, then the dropout that the paper trains with."""
    run = Training(bench)
    found["rows"] = run.tried
    recompute(run.model)
    run.attempt(bench.sizes.batches[-1], layers="computed anew in backward")
    del run
    run = Training(bench, dropout=0.05, attention_dropout=0.05)
    for batch in bench.sizes.batches[:2]:
        if run.has_time_for(batch):
            found["rows"].append(run.attempt(batch, dropout=0.05))


def recompute(model):
    """Compute each layer anew in backward; newer versions of transformers renamed the method."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


def training_schedules(bench, found):
    """Where a window alone does not fill the device."""
    run = Training(bench)
    found["rows"] = run.tried
    for batch in bench.sizes.small_batches:
        for schedule in ("layers", "wavefront"):
            if run.has_time_for(batch):
                run.model.config.schedule = schedule
                run.attempt(batch, schedule=schedule)
    times = {(row["batch"], row["schedule"]): row.get("ms per step") for row in run.tried}
    found["layers / wavefront"] = {
        f"batch {batch}": times[batch, "layers"] / times[batch, "wavefront"]
        for batch in bench.sizes.small_batches
        if times.get((batch, "layers")) and times.get((batch, "wavefront"))
    }


def compiled_layers(bench, found):
    """Each layer by itself."""

    def compile_layers(model):
        model.config.schedule = "layers"  # a wavefront would not call the layers one by one
        for layer in model.model.layers:
            layer.compile(backend=bench.sizes.compile_backend, dynamic=False)

    compiled(bench, found, compile_layers)


def compiled_model(bench, found):
    """The whole model in one, whose loss wants all logits."""
    backend = bench.sizes.compile_backend
    compiled(bench, found, lambda model: model.compile(backend=backend, dynamic=False))


def compiled(bench, found, compile_it):
    """Training at the batch that was fastest without, whose figures stand beside."""
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
    tell_best(found, run)
    require_one(run)
