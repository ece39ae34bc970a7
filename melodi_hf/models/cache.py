"""The memories of all layers as a transformers `Cache`.

One cache layer per decoder layer, holding that layer's memory and how far each row has read, in
tensors of fixed size: what is held does not depend on how much was read. It registers itself under
the name that the configs give in `layer_types`, so that generate() builds it unasked inside an
ordinary `DynamicCache` or `StaticCache`. `MelodiCache` adds what long documents need.

Tokens can be taken back (`crop`, for assisted decoding). Within the open window that is a matter of
counting. A window that was closed since `activate_past_recording()` is kept as it was before.
"""

import copy
import os
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicCache,
)

from .memory_file import load_memory_file, memory_fields, refuse_memory_of, save_memory_file
from .refusals import refuse_dropout, refuse_foreign_layer
from .tracing import is_traced, is_transformed
from .windows import Progress, put_rows, widened

# Columns whose ids are held, to tell new ids from a repetition of those that were read, and how far
# back a recording goes.
RECENT = 1024

NOT_AN_ID = -1  # a column of padding
UNKNOWN_ID = -2  # a column that was given as an embedding
FORGOTTEN = -3  # a column before those that are held


CARRY = (
    "to train on one segment after another, pass the memory that a call with return_memory=True "
    "returned as memory="
)
NODES = 64  # of a graph that are looked at, to find out whether it is still there


class FullWindow(NamedTuple):
    """The memory as some rows had filled their window and not closed it yet."""

    closing: Tensor  # B, which rows
    end: Tensor  # B, the tokens that they had read
    memory: Any


class WindowMemoryLayer(CacheLayerMixin):
    """The memory of one layer (a NamedTuple of tensors, rows first) for rows that may stand at
    different places of their documents."""

    _layer_type: str | None = "window_memory"
    is_croppable = True
    supports_early_init = False

    def __init__(self, **kwargs):
        self.memory: Any = None  # until the model fills it, as what follows
        self.progress: Any = None
        self.recent: Any = None  # B RECENT, the ids of the last columns
        self.output: Any = None  # B n D, of the last n columns, before the final norm: what a row
        # of padding goes on with; n is 1 unless tokens may be taken back
        self.knows_output = True
        self.columns: Any = 0  # read, padding included; a tensor in a static cache
        self.croppable = 0  # of them, those that `crop` may take back
        self.record_past = False
        self.journal: list[FullWindow] = []  # oldest first
        super().__init__(**kwargs)

    # What transformers' own tools look at: keys and values of the open window, and before it.
    keys: Any = property(lambda self: self._field("keys"), lambda self, value: None)
    values: Any = property(lambda self: self._field("values"), lambda self, value: None)

    def _field(self, name):
        return getattr(self.memory, name, None)

    def lazy_initialization(self, key_states, value_states):
        raise ValueError("the sizes of a memory are known to its model: let the model fill it")

    def update(self, key_states, value_states, *args, **kwargs):
        raise ValueError(
            "this cache holds a memory of windows, not the keys and values of every token: use it "
            "with the model it was made by (prefix tuning and other models cannot write to it)"
        )

    def begin(self, memory, window_length, output, device):
        """Hold an empty memory. output: B 1 D, zeros."""
        batch_size = output.shape[0]
        self.memory, self.window_length = memory, window_length
        self.progress = Progress(torch.zeros(batch_size, dtype=torch.long, device=device), 0)
        self.recent = torch.full((batch_size, RECENT), FORGOTTEN, device=device)
        self.output, self.knows_output = output, True

    def store(self, memory, progress, recent, output, columns, full_windows):
        """Take over the memory after a call of `columns` columns, padding included."""
        kept = progress.tokens_read - RECENT
        windows = [*self.journal, *full_windows]
        self.journal = [full for full in windows if (full.end > kept).any()]
        # What the journal holds must not be written to.
        write = _anew if full_windows else _write
        pairs = zip(self.memory, memory, strict=True)
        self.memory = type(memory)(*(write(held, new) for held, new in pairs))
        self.progress, self.recent, self.output = progress, recent, output
        self.knows_output = True
        self.columns += columns
        self.croppable = min(self.croppable + columns, RECENT)
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
            names = ("memory", "progress", "recent", "output", "journal")
            held = {name: getattr(self, name) for name in names}
            vars(self).update(tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, held))

    def __deepcopy__(self, memo):
        def refuse_graph(tensor):
            if tensor.requires_grad:
                raise ValueError(
                    f"a cache with a graph cannot be copied by copy.deepcopy: call cache.detach_() "
                    f"first, or cache.clone(), which copies without the graph; {CARRY}"
                )
            return tensor

        WindowMemoryLayer._for_all_tensors(copy.copy(self), refuse_graph)
        memo[id(self)] = twin = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def reset(self):
        if self.memory is not None:
            empty = type(self.memory)(*(torch.zeros_like(tensor) for tensor in self.memory))
            output = torch.zeros_like(self.output[:, :1])
            self.begin(empty, self.window_length, output, self.recent.device)
        self.columns, self.croppable, self.journal = 0, 0, []

    def reorder_cache(self, beam_idx):
        self._for_all_tensors(lambda t: t.index_select(0, beam_idx.to(t.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        self._for_all_tensors(lambda t: t.repeat_interleave(repeats, dim=0))

    def activate_past_recording(self):
        """From now on keep what `crop` needs to go back beyond the beginning of a window."""
        self.record_past = True

    def crop(self, tokens_to_remove):
        """Take back the last columns; how many is given as a negative number."""
        removed = -tokens_to_remove
        if not 0 <= removed <= self.croppable:
            raise ValueError(
                f"crop({tokens_to_remove}): give how many columns to take back as a negative "
                f"number, at most the last {self.croppable}; to go back further, clone the memory "
                f"before reading on"
            )
        if removed == 0:
            return
        lost = (self.recent[:, -removed:] != NOT_AN_ID).sum(1)
        tokens_read, fill = self.progress.tokens_read - lost, self.progress.fill
        self.memory = self._as_it_was(tokens_read, tokens_to_remove)
        rows = [full.closing & (full.end <= tokens_read) for full in self.journal]
        left = (full._replace(closing=r) for full, r in zip(self.journal, rows, strict=True))
        self.journal = [full for full in left if full.closing.any()]
        if fill is not None:
            together = bool((lost == lost[0]).all())
            fill = (fill - int(lost[0])) % self.window_length if together else None
        self.progress = Progress(tokens_read, fill)
        unknown = self.recent.new_full((len(self.recent), removed), FORGOTTEN)
        self.recent = torch.cat((unknown, self.recent[:, :-removed]), dim=1)
        self.knows_output = removed < self.output.shape[1]
        kept = self.output[:, :-removed]
        self.output = kept if self.knows_output else torch.zeros_like(self.output[:, :1])
        self.columns -= removed
        self.croppable -= removed

    def _as_it_was(self, tokens_read, asked):
        # The memory as the rows had read `tokens_read` (B,) tokens. Slots of a window that lie
        # behind what was read are never looked at.
        memory, before = self.memory, self.progress.tokens_read
        reached = tokens_read >= before - before % self.window_length
        for full in reversed(self.journal):
            rows = full.closing & (tokens_read < full.end)
            pairs = zip(full.memory, memory, strict=True)
            memory = type(memory)(*(_choose(rows, old, new) for old, new in pairs))
            reached = reached | (rows & (tokens_read >= full.end - self.window_length))
        if not reached.all():
            raise ValueError(
                f"crop({asked}) goes back beyond the beginning of the open window, and the window "
                f"before was not recorded: call activate_past_recording() before reading what may "
                f"have to be taken back, or clone the memory"
            )
        return memory

    def offload(self):
        if self.memory is not None:
            self.memory = type(self.memory)(*(tensor.to("cpu") for tensor in self.memory))

    def prefetch(self):
        if self.memory is not None:
            device = self.progress.tokens_read.device
            self.memory = type(self.memory)(*(tensor.to(device) for tensor in self.memory))


class StaticWindowMemoryLayer(WindowMemoryLayer):
    """The same in tensors that stay where they are, for steps that are compiled once."""

    _layer_type = None  # in the list of static layers, below
    is_compileable = True
    is_croppable = False

    def begin(self, memory, window_length, output, device):
        super().begin(memory, window_length, output, device)
        self.progress = Progress(self.progress.tokens_read, None)  # a number is part of the graph
        self.columns = torch.zeros((), dtype=torch.long, device=device)
        if not torch.compiler.is_compiling():
            counters = self.progress.tokens_read, self.recent, self.columns
            for tensor in (*memory, *counters, output):
                torch._dynamo.mark_static_address(tensor)

    def store(self, memory, progress, recent, output, columns, full_windows):
        self._unseal()
        for held, new in zip(self.memory, memory, strict=True):
            if not _is_there(new, held):
                held[_leading(new)] = new
        self.progress.tokens_read.copy_(progress.tokens_read)
        self.recent.copy_(recent)
        self.output.copy_(output)
        self.columns.add_(columns)
        self.is_initialized = True

    def _unseal(self):
        # What was made in inference mode may be written to in it alone.
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        if self.columns.is_inference():
            WindowMemoryLayer._for_all_tensors(self, torch.clone)
            self.columns = self.columns.clone()

    def _for_all_tensors(self, function):
        def stay(leaf):
            new = function(leaf)
            return leaf.copy_(new) if new.shape == leaf.shape else new

        super()._for_all_tensors(stay)

    def reset(self):
        if self.memory is not None:
            self._unseal()
            self._for_all_tensors(torch.zeros_like)
            self.recent.fill_(FORGOTTEN)
            self.columns.zero_()

    def activate_past_recording(self):
        raise ValueError("a static cache takes nothing back: use the default one")

    def crop(self, tokens_to_remove):
        if tokens_to_remove != 0:
            raise ValueError("a static cache takes nothing back: use the default one")


STATIC_LAYER_TYPE_MAPPING["window_memory"] = StaticWindowMemoryLayer
OURS = {WindowMemoryLayer.__name__, StaticWindowMemoryLayer.__name__}


class MelodiCache(DynamicCache):
    """The memory of a model during generation, of fixed size however long the document.

    Give it the model's config: `MelodiCache(model.config)`; then pass it as `cache`.
    """

    layers: list[WindowMemoryLayer]  # type: ignore[assignment] # of all kinds in transformers

    def __init__(self, config):
        if not isinstance(config, PreTrainedConfig) or not hasattr(config, "window_length"):
            raise ValueError(
                f"config is a {type(config).__name__}: pass the configuration of a model of this "
                f"library, MelodiCache(model.config)"
            )
        super().__init__(config=config)
        self.config_fields = memory_fields(config)  # of the model that the memory belongs to

    def save(self, path, dtype=None, model=None):
        """Write everything but what `crop` recorded into one safetensors file, whole or not at all.

        path: missing folders are made; an existing file is replaced once the new one is complete.
        dtype: of the numbers in the file; torch.bfloat16 halves a file of float32. Loading gives
            them back the type that they have now, but not the bits.
        model: the one that read the document; `load` then tells its weights from others.

        Raises `ValueError` for a cache that has read nothing, `OSError` if nothing can be written.
        """
        first, extras = self.layers[0], {}
        if first.recent is not None:
            forgotten = {f"forgotten.{kind}": n for kind, n in first.progress.forgotten.items()}
            extras = {"recent": first.recent, "output": first.output} | forgotten
            if not first.knows_output:
                extras["knows_output"] = torch.tensor(False)
        save_memory_file(self, path, dtype=dtype, model=model, extras=extras)

    @classmethod
    def load(cls, path, device=None, dtype=None, model=None) -> "MelodiCache":
        """A cache from a file that `save` wrote; a model that reads with it must fit.

        device: where the tensors go, the CPU unless told otherwise.
        dtype: of the numbers; None gives each the type that it had when it was saved.
        model: the one that is to go on: device and dtype default to its own, and it is refused here
            if it does not fit; only so are weights checked, and only if `save` was given a model.

        Raises `FileNotFoundError`, and `ValueError` for a file that is damaged, of another kind or
        version, or of another model.
        """
        saved = load_memory_file(path, device=device, dtype=dtype, model=model)
        forgotten = {
            name.removeprefix("forgotten."): number_of_windows
            for name, number_of_windows in saved.extras.items()
            if name.startswith("forgotten.")
        }
        cache = cls.__new__(cls)
        Cache.__init__(cache, layers=[WindowMemoryLayer() for _ in saved.layers])
        cache.config_fields = saved.config
        for layer, memory in zip(cache.layers, saved.layers, strict=True):
            layer.memory, layer.window_length = memory, saved.config["window_length"]
            layer.progress = Progress(saved.tokens_read, saved.fill, forgotten)
            layer.recent, layer.output = saved.extras["recent"], saved.extras["output"]
            layer.knows_output = bool(saved.extras.get("knows_output", True))
            layer.columns = saved.columns
            layer.is_initialized = True
        return cache

    @classmethod
    def from_memory(cls, memory, model) -> "MelodiCache":
        """Convert the memory that training carries, `model(..., return_memory=True).memory`.

        The cache continues exactly where the memory ended, also within a window; it shares no
        tensor with it and has no graph. It keeps what `to_memory` needs: MELODI's queue and the
        compressed memory of a Compressive Transformer are held as hidden states, too, beside
        their keys and values. Ids and positions of padding are not known: columns are counted as
        the tokens of the row that has most.

        Raises `ValueError` for a memory of another model, and a model with dropout in training
        mode.
        """
        refuse_dropout(model)
        decoder = model.get_decoder()
        cache, held = cls(decoder.config), decoder.to_generation(memory)
        progress = held.progress
        device, rows = progress.tokens_read.device, len(progress.tokens_read)
        output = torch.zeros(rows, 1, decoder.config.hidden_size, dtype=model.dtype, device=device)
        columns = int(progress.tokens_read.max())
        for layer, layer_memory in zip(cache.layers, held.layers, strict=True):
            layer.begin(layer_memory, decoder.config.window_length, output, device)
            layer.progress, layer.columns, layer.is_initialized = progress, columns, True
            layer.knows_output = columns == 0
        return cache

    def to_memory(self, model):
        """Convert to the memory that training carries, for `model(..., memory=...)`.

        It continues exactly where the cache ended, shares no tensor with it and has no graph.

        Raises `ValueError` for a cache that has read nothing or belongs to another model; and for
        one of a system whose training needs hidden states that generation does not keep (MELODI
        with long-term memory, Compressive Transformer), unless it came from `from_memory`.
        """
        first, decoder = self.layers[0], model.get_decoder()
        if first.memory is None:
            raise ValueError("the cache has read no token yet: training begins with memory=None")
        refuse_memory_of(self.config_fields, decoder.config)
        return decoder.to_training([layer.memory for layer in self.layers], first.progress)

    def memory_bytes(self) -> int:
        """Bytes of the memories."""
        return memory_bytes(self)

    def clone(self) -> "MelodiCache":
        """Another one with the same content and without a graph; what one of them reads the other
        does not know."""
        return clone_cache(self)

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


def clone_cache(cache):
    """A copy of a cache of this library that shares no tensor with it."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in twin.layers:
        # Not what a static layer does, which stays where it is.
        WindowMemoryLayer._for_all_tensors(layer, lambda tensor: tensor.detach().clone())
        layer.columns = copy.deepcopy(layer.columns)
    return twin


@contextmanager
def within_windows(cache):
    """Calls of one token inside take the caller's word that it begins no row's window and closes
    none: compiled, they have no branch. A static cache knows no more than that by itself."""
    first = cache.layers[0]
    first.progress = first.progress._replace(within=True)
    try:
        yield
    finally:
        first.progress = first.progress._replace(within=False)


def memory_bytes(cache) -> int:
    """Bytes of the memories that a cache of this library holds."""
    held = [t for layer in cache.layers if layer.memory is not None for t in layer.memory]
    return sum(t.numel() * t.element_size() for t in held)


def check_cache(cache, num_layers, name="cache"):
    """Raise `ValueError` unless `cache` is one that a model of so many layers can write to.

    name: what the user calls it.
    """
    if hasattr(cache, "progress"):
        raise ValueError(
            f"{name} is a {type(cache).__name__}, the memory of training (from a call with "
            f"return_memory=True): convert it, MelodiCache.from_memory(memory, model)"
        )
    if isinstance(cache, (str, os.PathLike)):  # not a union, which torch 2.9 cannot trace
        raise ValueError(
            f"{name} is the path {str(cache)!r}: load the file, "
            f"MelodiCache.load({str(cache)!r}, model=model)"
        )
    if not isinstance(cache, Cache):
        raise ValueError(
            f"{name} is a {type(cache).__name__}: give MelodiCache(model.config), what "
            f"model.read_document(...) returned, or nothing"
        )
    kinds = {type(held).__name__ for held in cache.layers}
    if cache.layers and (not kinds <= OURS or len(cache.layers) != num_layers):
        raise ValueError(
            f"the cache holds {len(cache.layers)} layers ({', '.join(sorted(kinds))}) and "
            f"this model has {num_layers}: give MelodiCache(model.config), or nothing (prefix "
            f"tuning cannot write to a memory; prompt tuning can)"
        )


def fetch_memory(cache, layers, x):
    """The memories in a cache and how far its rows have read; an empty cache is given empty ones.

    layers: the model's; x: B T D, whose device, type and batch size an empty cache takes.
    """
    check_cache(cache, len(layers))
    if len(cache.layers) == 0:  # DynamicCache() without a config
        cache.layers = [WindowMemoryLayer() for _ in layers]
    if isinstance(cache, MelodiCache):
        refuse_memory_of(cache.config_fields, layers[0].config)
    held_layers = cast(list[WindowMemoryLayer], cache.layers)
    if held_layers[0].memory is None:
        device = "cpu" if cache.offloading else x.device
        for held, layer in zip(held_layers, layers, strict=True):
            empty = layer.empty_memory(len(x), device, x.dtype, for_generation=True)
            held.begin(empty, layer.config.window_length, torch.zeros_like(x[:, :1]), x.device)
    _refuse_other(cache, layers, x)
    if torch.is_grad_enabled() and not (is_traced() or layers[0].gradient_checkpointing):
        _refuse_freed_graph(held_layers[0].memory)
    pairs = zip(layers, held_layers, strict=True)
    memories = tuple(_in_type(layer, held.memory, x.dtype) for layer, held in pairs)
    return memories, held_layers[0].progress


def store_memory(cache, memory, plan, output, input_ids, mask):
    """Write the memory after a call back into the cache.

    output: B T D; input_ids: B T, or None if embeddings were read; mask: B T, true at tokens, None
    if all are.
    """
    if cache.layers[0].record_past:
        output = torch.cat((cache.layers[0].output, output.detach()), dim=1)[:, -RECENT:]
    else:
        output = output[:, -1:].detach().clone()  # a view would keep all of it
    recent = cache.layers[0].recent
    if input_ids is None:
        input_ids = recent.new_full((len(recent), plan.num_columns), UNKNOWN_ID)
    if mask is not None:
        input_ids = input_ids.masked_fill(~mask, NOT_AN_ID)
    recent = torch.cat((recent, input_ids.to(recent.device)), dim=1)[:, -RECENT:]
    for i, (held, new) in enumerate(zip(cache.layers, memory.layers, strict=True)):
        full = [_full_window(chunk, held, i) for chunk in plan.chunks if chunk.snapshots]
        held.store(new, memory.progress, recent, output, plan.num_columns, full)


def _full_window(chunk, held, layer_idx):
    # What a chunk remembers of a layer, for all rows of the batch.
    memory, closing, end = chunk.snapshots[layer_idx], chunk.closing, chunk.end
    if chunk.rows is not None:
        pairs = zip(held.memory, memory, strict=True)
        memory = type(memory)(*(put_rows(old, new, chunk.rows) for old, new in pairs))
        everyone = torch.zeros_like(held.progress.tokens_read)
        closing = everyone.bool().index_copy(0, chunk.rows, closing)
        end = everyone.index_copy(0, chunk.rows, end)
    return FullWindow(closing, end, memory)


def _refuse_other(cache, layers, x):
    rows = cache.layers[0].batch_size
    if rows != len(x):
        raise ValueError(
            f"the cache holds {rows} rows and the batch has {len(x)}: repeat or select rows "
            f"with batch_repeat_interleave or batch_select_indices, or begin with an empty cache"
        )
    for i, (held, layer) in enumerate(zip(cache.layers, layers, strict=True)):
        free = dict.fromkeys(layer.needed_in_training, 1)
        refuse_foreign_layer(i, held.memory, layer.memory_shapes(for_generation=True), free)


def _refuse_freed_graph(memory):
    """A graph that an earlier backward went through cannot be continued."""
    if any(_is_freed(tensor.grad_fn) for tensor in memory):
        raise ValueError(
            f"the cache holds the graph of a call whose backward has freed it: call "
            f"cache.detach_() after each backward; {CARRY}"
        )


def _is_freed(node):
    # Breadth first, since only nodes that lead to an earlier loss are freed.
    nodes = [node]
    for node in nodes:  # which grows
        if node is None:
            continue
        try:
            for name in dir(node):
                if name == "saved_tensors" or name.startswith("_saved_"):
                    getattr(node, name)
        except RuntimeError as error:
            if "a second time" in str(error):
                return True
        nodes += [n for n, _ in node.next_functions if n not in nodes][: NODES - len(nodes)]
    return False


def _in_type(layer, memory, dtype):
    # A memory may have been read in another precision.
    if all(tensor.dtype == dtype for tensor in memory):
        return memory
    return layer.in_type(memory, dtype)


def _choose(rows, old, new):
    rows = rows.to(new.device).view(-1, *[1] * (new.dim() - 1))
    return torch.where(rows, widened(old.to(new.dtype), new.shape), new)


def _leading(tensor):
    return tuple(slice(0, size) for size in tensor.shape)


def _is_there(new, held):
    # Nothing changed, or the window was written in place.
    if new is held:
        return True
    if is_traced() or new.stride() != held.stride():
        return False
    return new.data_ptr() == held.data_ptr() and new.dtype == held.dtype


def _anew(held, new):
    return widened(new, held.shape).clone()


def _write(held, new):
    # The leading slots of a buffer of fixed size; where torch forbids writing there (a graph, a
    # buffer made in inference mode), a new one takes its place.
    if _is_there(new, held):
        return held
    has_graph = new.requires_grad or held.requires_grad
    is_sealed = not torch.compiler.is_compiling() and held.is_inference()
    is_sealed = is_sealed and not torch.is_inference_mode_enabled()
    moved = new.dtype != held.dtype or new.device != held.device
    if has_graph or is_sealed or moved or is_transformed() or new.shape == held.shape:
        return widened(new, held.shape)
    held[_leading(new)] = new
    return held
