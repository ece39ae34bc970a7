"""Where the host waits for the device, and with that the device for the host.

CUDA tells of every operation that waits (`torch.cuda.set_sync_debug_mode`); counted are those of
one training step, of a long prefill, and of the tokens decoded within a window and at its end.
"""

import warnings
from collections import Counter
from contextlib import contextmanager

import torch

from melodi_hf import MelodiCache

from .reading import read
from .training import Training


@contextmanager
def waits(bench):
    """A counter of file:line -> how often the host waited there, inside."""
    places = Counter()
    if not bench.is_cuda:
        yield places
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places.update(
        f"{'/'.join(w.filename.split('/')[-2:])}:{w.lineno}"
        for w in told
        if "synchronizing" in str(w.message)
    )


def waiting(bench, found):
    """How often and where, work by work."""
    run = Training(bench)
    ids, window = bench.ids(1, bench.sizes.segment), bench.config().window_length
    memory = run.step(ids, None, True)
    with waits(bench) as places:
        run.step(ids, memory, True)
    found["training step"] = described(bench, places)
    del run
    with torch.inference_mode():
        model, cache = bench.model().to(torch.bfloat16).eval(), MelodiCache(bench.config())
        read(model, cache, ids, bench.sizes.segment)
        with waits(bench) as places:
            read(model, cache, ids, bench.sizes.segment)
        found["prefill of a segment"] = described(bench, places)
        read(model, cache, ids[:, : window - 9], window)
        for name, tokens in (("tokens within a window", 8), ("closing a window", 1)):
            with waits(bench) as places:
                read(model, cache, bench.ids(1, tokens), 1)
            found[name] = described(bench, places) | {"tokens": tokens}


def described(bench, places):
    if not bench.is_cuda:
        return {"note": "no CUDA: nothing to count"}
    return {"waits": sum(places.values()), "where": dict(places.most_common(8))}
