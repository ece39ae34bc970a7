"""Search of the nearest remembered keys in an index of faiss (Douze et al., 2024).

An index holds the keys that the queries of a step attend to, for one row and one head. It is built
at the first search and cached as long as the tensor that it was built from exists unchanged, so
the decoding steps of one window share it.
"""

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .configuration_decoder import require
from .kernels import is_traced

faiss: Any
try:
    import faiss
except ImportError:
    faiss = None


class FaissSearch:
    """`find_nearest` with the index that a factory string of faiss describes."""

    def __init__(self, description, dimension):
        self.description, self.dimension = description, dimension
        check_index(description, dimension)

    @torch.no_grad()
    def __call__(self, q, sources, low, high, count):
        """As `find_nearest`, where all queries of a row share one range: low and high are B 1."""
        require(
            not is_traced(),
            "an index of faiss cannot be part of a compiled graph or of a transform of "
            "torch.func: give faiss_index=None, or generate without a static cache",
        )
        positions = torch.cat([source.positions() for source in sources], dim=1)
        is_seen = ((low <= positions) & (positions < high)).cpu()
        queries = q.float().cpu()
        found = torch.full((*q.shape[:3], count), -1)
        for row in is_seen.any(1).nonzero()[:, 0].tolist():
            slots = is_seen[row].nonzero()[:, 0]
            for head in range(q.shape[1]):
                index = self._index(sources, slots, row, head)
                _, nearest = index.search(queries[row, head].numpy(), min(count, len(slots)))
                nearest = torch.from_numpy(nearest)  # -1 where there is none
                nearest = slots[nearest.clamp(min=0)].where(nearest >= 0, -1)
                found[row, head, :, : nearest.shape[1]] = nearest
        return found.to(q.device)

    def _index(self, sources, slots, row, head):
        # Only the first source is cached: the others change with every call.
        is_cached = slots[-1] < sources[0].keys.shape[2]
        indices = indices_of(sources[0].keys) if is_cached else {}
        name = row, head, int(slots[0]), int(slots[-1])
        if name not in indices:
            keys = torch.cat([source.keys[row, head].float().cpu() for source in sources])[slots]
            indices[name] = self._build(keys.contiguous().numpy())
        return indices[name]

    def _build(self, keys):
        index = faiss.index_factory(self.dimension, self.description, faiss.METRIC_INNER_PRODUCT)
        try:
            if not index.is_trained:
                index.train(keys)
        except RuntimeError:  # fewer keys than clusters
            index = faiss.IndexFlatIP(self.dimension)
        index.add(keys)
        return index


INDICES = WeakTensorKeyDictionary()  # type: ignore[var-annotated] # keys -> version, indices


def indices_of(keys):
    """Return the cached indices of a tensor, an empty dictionary if it was modified since."""
    # Inference tensors have no version: nothing tells whether they were modified.
    version = object() if keys.is_inference() else keys._version
    if INDICES.get(keys, (None, {}))[0] != version:
        INDICES[keys] = version, {}
    return INDICES[keys][1]


def check_index(description, dimension):
    """Check at construction that faiss can make an index.

    Raises:
        ValueError: faiss is not installed, or does not know the factory string.
    """
    require(
        faiss is not None,
        f"faiss_index is {description!r} and faiss is not installed: pip install faiss-cpu, or "
        f"give faiss_index=None for exact search",
    )
    try:
        faiss.index_factory(dimension, description, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"faiss_index is {description!r}, of which faiss cannot make an index of dimension "
            f'{dimension}: give a factory string such as "Flat" or "HNSW32" ({error})'
        ) from error
