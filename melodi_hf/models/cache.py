"""The memories of all layers as a transformers `Cache`.

One cache layer per decoder layer, holding that layer's memory and how far each row has read, in
tensors of fixed size: what is held does not depend on how much was read. It registers itself under
the name that the configs give in `layer_types`, so that generate() builds it unasked inside an
ordinary `DynamicCache`. `MelodiCache` adds what long documents need.
"""

from typing import cast

import torch
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from .refusals import refuse_foreign_layer
from .windows import Progress


class WindowMemoryLayer(CacheLayerMixin):
    """The memory of one layer (a NamedTuple of tensors, rows first) for rows that may stand at
    different places of their documents."""

    _layer_type = "window_memory"
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.memory, self.progress, self.columns = None, None, 0

    def lazy_initialization(self, key_states, value_states):
        raise ValueError("the sizes of a memory are known to its model: let the model fill it")

    def update(self, key_states, value_states, *args, **kwargs):
        raise ValueError(
            "this cache holds a memory of windows, not the keys and values of every token: use it "
            "with the model it was made by (prefix tuning and other models cannot write to it)"
        )

    def store(self, memory, progress, columns):
        """Take over the memory after a call that read `columns` columns, padding included."""
        self.progress, self.columns = progress, self.columns + columns
        assert self.memory is not None  # fetch_memory comes first
        pairs = zip(self.memory, memory, strict=True)
        self.memory = type(memory)(*(_write(held, new) for held, new in pairs))
        self.is_initialized = True

    def get_seq_length(self):
        return self.columns

    def get_mask_sizes(self, query_length):
        return self.columns + query_length, 0

    def get_max_length(self):
        return -1

    get_max_cache_shape = get_max_length

    @property
    def batch_size(self):
        return -1 if self.progress is None else len(self.progress.tokens_read)

    def _for_all_tensors(self, function):
        if self.memory is not None:
            self.memory, self.progress = tree_map(
                lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf,
                (self.memory, self.progress),
            )

    def reset(self):
        self._for_all_tensors(torch.zeros_like)
        self.columns = 0
        if self.progress is not None:
            self.progress = Progress(self.progress.tokens_read, 0)

    def reorder_cache(self, beam_idx):
        self._for_all_tensors(lambda t: t.index_select(0, beam_idx.to(t.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        self._for_all_tensors(lambda t: t.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove):
        if tokens_to_remove != 0:
            raise ValueError(
                f"crop({tokens_to_remove}): a memory cannot take back tokens that it has read; "
                f"clone it before reading what may have to be undone"
            )

    def offload(self):
        self.device = None if self.progress is None else self.progress.tokens_read.device
        self._for_all_tensors(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self):
        if self.is_initialized and self.device is not None:
            self._for_all_tensors(lambda t: t.to(self.device, non_blocking=True))


class MelodiCache(DynamicCache):
    """The memory of a model during generation, of fixed size however long the document.

    Give it the model's config: `MelodiCache(model.config)`; then pass it as `past_key_values`.
    """

    layers: list[WindowMemoryLayer]  # type: ignore[assignment] # of all kinds in transformers

    def __init__(self, config):
        super().__init__(config=config)

    def memory_bytes(self) -> int:
        """Bytes of everything that is held."""
        return memory_bytes(self)

    def detach_(self):
        """Cut the graph behind everything that is held."""
        for layer in self.layers:
            layer._for_all_tensors(torch.Tensor.detach)
        return self

    def to(self, *args, **kwargs):
        """Move, or change the type of, the floating-point numbers; counters keep theirs."""

        def move(tensor):
            device = torch.empty(0).to(*args, **kwargs).device
            return tensor.to(*args, **kwargs) if tensor.is_floating_point() else tensor.to(device)

        for layer in self.layers:
            layer._for_all_tensors(move)
        return self


def memory_bytes(cache) -> int:
    """Bytes of the tensors that a cache of this library holds."""
    held = [t for layer in cache.layers if layer.memory is not None for t in layer.memory]
    return sum(t.numel() * t.element_size() for t in held)


def fetch_memory(cache, layers, x):
    """The memories in a cache and how far its rows have read; an empty cache is given empty ones.

    layers: the model's; x: B T D, whose device, type and batch size an empty cache takes.
    """
    if not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}: give MelodiCache(model.config), "
            f"or nothing"
        )
    if len(cache.layers) == 0:  # DynamicCache() without a config
        cache.layers = [WindowMemoryLayer() for _ in layers]
    kinds = {type(held).__name__ for held in cache.layers}
    if kinds != {WindowMemoryLayer.__name__} or len(cache.layers) != len(layers):
        raise ValueError(
            f"past_key_values holds {len(cache.layers)} layers ({', '.join(sorted(kinds))}) and "
            f"this model has {len(layers)}: give MelodiCache(model.config), or nothing"
        )
    held_layers = cast(list[WindowMemoryLayer], cache.layers)
    if held_layers[0].memory is None:
        _fill(cache, layers, x)
    _refuse_other(cache, layers, x)
    return tuple(held.memory for held in held_layers), held_layers[0].progress


def store_memory(cache, memory, columns):
    """Write the memory after a call that read `columns` columns back into the cache."""
    for held, new in zip(cache.layers, memory.layers, strict=True):
        held.store(new, memory.progress, columns)


def _fill(cache, layers, x):
    progress = Progress(torch.zeros(len(x), dtype=torch.long, device=x.device), 0)
    for held, layer in zip(cache.layers, layers, strict=True):
        held.memory = layer.empty_memory(len(x), x.device, x.dtype, for_generation=True)
        held.progress = progress


def _refuse_other(cache, layers, x):
    rows = cache.layers[0].batch_size
    if rows != len(x):
        raise ValueError(
            f"past_key_values holds {rows} rows and the batch has {len(x)}: repeat or select rows "
            f"with batch_repeat_interleave or batch_select_indices, or begin with an empty cache"
        )
    for i, (held, layer) in enumerate(zip(cache.layers, layers, strict=True)):
        refuse_foreign_layer(i, held.memory, layer.memory_shapes(for_generation=True), {})


def _write(held, new):
    # The leading slots of a buffer of fixed size; where torch forbids writing there (a graph, a
    # buffer made in inference mode), a new one takes its place.
    if new is held:
        return held
    has_graph = new.requires_grad or held.requires_grad
    is_sealed = held.is_inference() and not torch.is_inference_mode_enabled()
    if has_graph or is_sealed or new.dtype != held.dtype or held.device != new.device:
        return _widened(new, held.shape)
    held[tuple(slice(0, size) for size in new.shape)] = new
    return held


def _widened(tensor, shape):
    missing = [full - size for full, size in zip(shape, tensor.shape, strict=True)]
    pad = [slots for after in reversed(missing) for slots in (0, after)]
    return torch.nn.functional.pad(tensor, pad)
