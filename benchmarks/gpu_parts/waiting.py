"""Count synchronizations of host and device.

`torch.cuda.set_sync_debug_mode` reports every synchronizing operation. They are counted for a
training step, a long prefill, and tokens decoded in the middle and at the end of a window.
"""

import warnings
from collections import Counter
from contextlib import contextmanager

import torch

from melodi_hf import MelodiCache

from .reading import read
from .training import Training


@contextmanager
def count_synchronizations(bench):
    """Count synchronizations inside, by file:line."""
    places = Counter()
    if not bench.is_cuda:
        yield places
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places.update(
        f"{'/'.join(w.filename.split('/')[-2:])}:{w.lineno}"
        for w in caught
        if "synchronizing" in str(w.message)
    )


def waiting(bench, found):
    """Count synchronizations of each workload."""
    run = Training(bench)
    ids, window = bench.ids(1, bench.sizes.segment), bench.config().window_length
    memory = run.step(ids, None, True)
    with count_synchronizations(bench) as places:
        run.step(ids, memory, True)
    found["training step"] = describe_places(bench, places)
    del run
    with torch.inference_mode():
        model, cache = bench.model().to(torch.bfloat16).eval(), MelodiCache(bench.config())
        read(model, cache, ids, bench.sizes.segment)
        with count_synchronizations(bench) as places:
            read(model, cache, ids, bench.sizes.segment)
        found["prefill of a segment"] = describe_places(bench, places)
        read(model, cache, ids[:, : window - 9], window)
        for name, tokens in (("tokens within a window", 8), ("closing a window", 1)):
            with count_synchronizations(bench) as places:
                read(model, cache, bench.ids(1, tokens), 1)
            found[name] = describe_places(bench, places) | {"tokens": tokens}


def describe_places(bench, places):
    if not bench.is_cuda:
        return {"note": "no CUDA: nothing to count"}
    return {"waits": sum(places.values()), "where": dict(places.most_common(8))}
