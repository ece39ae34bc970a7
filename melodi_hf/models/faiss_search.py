"""The nearest remembered keys, found by an index of faiss (Douze et al., 2024).

An index holds the keys that the queries of a chunk see, for one row and one head. It is built when
they are first searched and kept as long as the tensor that it was built from: a decoding step finds
the index of the step before, and the keys of a new window or another document have their own.
"""

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .tracing import is_traced

faiss: Any
try:
    import faiss
except ImportError:
    faiss = None


class FaissSearch:
    """`find_nearest` by the index that a factory string of faiss describes."""

    def __init__(self, description, dimension):
        self.description, self.dimension = description, dimension
        refuse_bad_index(description, dimension)

    @torch.no_grad()
    def __call__(self, q, sources, low, high, count, rows=None):
        """All queries of a row see the same places: low and high are R 1."""
        if is_traced():
            raise ValueError(
                "an index of faiss cannot be part of a compiled graph or of a transform of "
                "torch.func: give faiss_index=None, or generate without a static cache"
            )
        rows = torch.arange(len(q)) if rows is None else rows
        places = torch.cat([source.places for source in sources], dim=1)[rows]
        is_seen = ((low <= places) & (places < high)).cpu()
        queries = q.float().cpu()
        found = torch.full((*q.shape[:3], count), -1)
        for i, row in enumerate(rows.tolist()):
            slots = is_seen[i].nonzero()[:, 0]
            for head in range(q.shape[1] if len(slots) else 0):
                index = self._index(sources, slots, row, head)
                _, nearest = index.search(queries[i, head].numpy(), min(count, len(slots)))
                nearest = torch.from_numpy(nearest)  # -1 where there is none
                held = slots[nearest.clamp(min=0)].where(nearest >= 0, -1)
                found[i, head, :, : held.shape[1]] = held
        return found.to(q.device)

    def _index(self, sources, slots, row, head):
        held = built_from(sources[0].keys)
        name = row, head, int(slots[0]), int(slots[-1])
        is_of_one = slots[-1] < sources[0].keys.shape[2]  # what follows changes with every call
        if is_of_one and name in held:
            return held[name]
        keys = torch.cat([source.keys[row, head].float().cpu() for source in sources])[slots]
        index = self._built(keys.contiguous().numpy())
        if is_of_one:
            held[name] = index
        return index

    def _built(self, keys):
        index = faiss.index_factory(self.dimension, self.description, faiss.METRIC_INNER_PRODUCT)
        try:
            if not index.is_trained:
                index.train(keys)
        except RuntimeError:  # fewer keys than clusters
            index = faiss.IndexFlatIP(self.dimension)
        index.add(keys)
        return index


INDICES = WeakTensorKeyDictionary()  # type: ignore[var-annotated] # keys -> their indices


def built_from(keys):
    """The indices of a tensor as it is now."""
    version = None if keys.is_inference() else keys._version
    known = INDICES.get(keys)
    if known is None or known[0] != version or version is None:
        known = version, {}
        INDICES[keys] = known
    return known[1]


def refuse_bad_index(description, dimension):
    """An index that cannot be made is refused before anything is read."""
    if faiss is None:
        raise ValueError(
            f"faiss_index is {description!r} and faiss is not installed: pip install faiss-cpu, or "
            f"give faiss_index=None for exact search"
        )
    try:
        faiss.index_factory(dimension, description, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"faiss_index is {description!r}, of which faiss cannot make an index of dimension "
            f'{dimension}: give a factory string such as "Flat" or "HNSW32" ({error})'
        ) from error
