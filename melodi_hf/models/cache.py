"""The memories of all layers as a transformers `Cache`.

One cache layer per decoder layer holds that layer's memory, in tensors of fixed size; what all
layers share, such as how far each row has read, is in one `CacheState`. The cache layers register
themselves under the name that the configurations give in `layer_types`, so that generate() builds
them inside a `DynamicCache` or `StaticCache`. `MelodiCache` adds what long documents need.

Tokens can be removed (`crop`, for assisted decoding): within the open window by counting, beyond
it from the snapshots that are taken after `activate_past_recording()`.
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

from .kernels import is_traced, is_transformed
from .memory_file import check_memory_of, load_memory_file, memory_fields, save_memory_file
from .validation import check_dropout, check_layer_memory
from .windows import (
    Progress,
    is_locked_inference_tensor,
    join_parts,
    pad_to_shape,
    where_rows,
)

RECENT = 1024  # columns whose ids are held, to recognise repeated ids, and that `crop` may remove
PADDING_ID = -1  # a column of padding
UNKNOWN_ID = -2  # a column that was given as an embedding
FORGOTTEN_ID = -3  # a column before those that are held
MAX_GRAPH_NODES = 64  # that are looked at, to find a graph that was freed

CARRY = (
    "to train on one segment after another, pass the memory that a call with return_memory=True "
    "returned as memory="
)


class WindowSnapshot(NamedTuple):
    """The memories when some rows had filled their window and not closed it yet."""

    closing: Tensor  # B, which rows
    end: Tensor  # B, the tokens that they had read
    memories: tuple[Any, ...]  # of all layers


class CacheState:
    """What all layers of a cache share."""

    def __init__(self, window_length, output, device):
        self.window_length = window_length
        rows = len(output)
        self.progress = Progress(torch.zeros(rows, dtype=torch.long, device=device), 0)
        self.recent = torch.full((rows, RECENT), FORGOTTEN_ID, device=device)
        # B n D, of the last n columns, before the final norm; n is 1 unless tokens may be removed.
        self.output, self.has_last_hidden = output, True
        self.columns: Any = 0  # read, padding included; a tensor in a static cache
        self.croppable = 0  # of them, those that `crop` may remove
        self.snapshots: list[WindowSnapshot] = []  # oldest first
        self.restored: list[tuple[Tensor, WindowSnapshot]] = []  # by the last crop, newest first

    def store(self, progress, recent, output, columns, snapshots):
        """Update after a call of so many columns."""
        oldest, self.restored = progress.tokens_read - RECENT, []
        snapshots = [*self.snapshots, *snapshots]
        self.snapshots = [each for each in snapshots if (each.end > oldest).any()]
        self.progress, self.recent, self.output = progress, recent, output
        self.has_last_hidden = True
        self.columns += columns
        self.croppable = min(self.croppable + columns, RECENT)

    def map_tensors(self, function):
        """Replace each tensor t by function(t)."""
        for name in ("progress", "recent", "output", "snapshots"):
            held = tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, vars(self)[name])
            setattr(self, name, held)

    def reset(self):
        """Return to the state before the first token."""
        output = torch.zeros_like(self.output[:, :1])
        vars(self).update(vars(CacheState(self.window_length, output, self.recent.device)))

    def crop(self, removed):
        """Remove the last columns; `restored` then tells the layers which rows to restore."""
        self.restored = []
        if removed == 0:
            return
        lost = (self.recent[:, -removed:] != PADDING_ID).sum(1)
        before, offset = self.progress.tokens_read, self.progress.offset
        tokens_read = before - lost
        self.restored = self._snapshots_after(tokens_read, removed)
        rows = [each.closing & (each.end <= tokens_read) for each in self.snapshots]
        pairs = zip(self.snapshots, rows, strict=True)
        self.snapshots = [each._replace(closing=left) for each, left in pairs if left.any()]
        if offset is not None:
            is_equal = bool((lost == lost[0]).all())
            offset = (offset - int(lost[0])) % self.window_length if is_equal else None
        self.progress = Progress(tokens_read, offset)
        unknown = self.recent.new_full((len(self.recent), removed), FORGOTTEN_ID)
        self.recent = torch.cat((unknown, self.recent[:, :-removed]), dim=1)
        self.has_last_hidden = removed < self.output.shape[1]
        kept = self.output[:, :-removed]
        self.output = kept if self.has_last_hidden else torch.zeros_like(self.output[:, :1])
        self.columns -= removed
        self.croppable -= removed

    def _snapshots_after(self, tokens_read, removed):
        # Rows to restore and the snapshots to restore them from, newest first.
        before, length = self.progress.tokens_read, self.window_length
        is_reached, restored = tokens_read >= before - before % length, []
        for each in reversed(self.snapshots):
            rows = each.closing & (tokens_read < each.end)
            is_reached = is_reached | (rows & (tokens_read >= each.end - length))
            restored.append((rows, each))
        if not is_reached.all():
            raise ValueError(
                f"crop({-removed}) goes back beyond the beginning of the open window, and the "
                f"window before was not recorded: call activate_past_recording() before reading "
                f"what may have to be removed, or clone the memory"
            )
        return restored


class StaticCacheState(CacheState):
    """The same in tensors that stay where they are, for steps that are compiled once."""

    def __init__(self, window_length, output, device):
        super().__init__(window_length, output, device)
        self.progress = Progress(self.progress.tokens_read, None)  # an int is part of the graph
        self.columns = torch.zeros((), dtype=torch.long, device=device)

    @property
    def tensors(self):
        return self.progress.tokens_read, self.recent, self.output, self.columns

    def unlock(self):
        """Replace tensors that were made in inference mode, where that is over."""
        if is_locked_inference_tensor(self.columns):
            CacheState.map_tensors(self, torch.clone)
            self.columns = self.columns.clone()

    def store(self, progress, recent, output, columns, snapshots):
        self.unlock()
        self.progress.tokens_read.copy_(progress.tokens_read)
        self.recent.copy_(recent)
        self.output.copy_(output)
        self.columns.add_(columns)

    def map_tensors(self, function):
        super().map_tensors(lambda tensor: copy_if_equal_shape(tensor, function(tensor)))

    def reset(self):
        self.unlock()
        self.map_tensors(torch.zeros_like)
        self.recent.fill_(FORGOTTEN_ID)
        self.columns.zero_()


class WindowMemoryLayer(CacheLayerMixin):
    """The memory of one layer, a NamedTuple of tensors with rows first."""

    _layer_type: str | None = "window_memory"
    is_croppable = True
    supports_early_init = False
    state_class: type[CacheState] = CacheState

    def __init__(self, **kwargs):
        self.memory: Any = None  # until the model fills it, as the next two
        self.state: Any = None
        self.layer_idx = 0
        self.record_past = False
        super().__init__(**kwargs)

    # What transformers' own tools look at: keys and values of the open window.
    keys: Any = property(lambda self: getattr(self.memory, "keys", None), lambda self, value: None)
    values: Any = property(
        lambda self: getattr(self.memory, "values", None), lambda self, value: None
    )
    # What all layers share, by the names of `CacheState`.
    progress = property(lambda self: self.state.progress)
    recent = property(lambda self: None if self.state is None else self.state.recent)
    columns = property(lambda self: 0 if self.state is None else self.state.columns)

    def lazy_initialization(self, key_states, value_states):
        raise ValueError("pass the cache to the model, which allocates it")

    def update(self, key_states, value_states, *args, **kwargs):
        raise ValueError(
            "this cache holds a memory of windows, not the keys and values of every token: use it "
            "with the model it was made by (prefix tuning and other models cannot write to it)"
        )

    def begin(self, memory, state, layer_idx):
        """Hold a memory; the first layer owns the shared state."""
        self.memory, self.state, self.layer_idx = memory, state, layer_idx

    def store(self, memory, keep_old=False):
        """Take over the memory after a call; keep_old: snapshots share tensors with this one."""
        write = copy_padded if keep_old else write_leading_slots
        pairs = zip(self.memory, memory, strict=True)
        self.memory = type(memory)(*(write(held, new) for held, new in pairs))
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
        return -1 if self.state is None else len(self.state.recent)

    def map_tensors(self, function):
        """Replace each tensor t by function(t); in the first layer also what all layers share."""
        if self.memory is None:
            return
        self.memory = type(self.memory)(*map(function, self.memory))
        if self.layer_idx == 0:
            self.state.map_tensors(function)

    def __deepcopy__(self, memo):
        if self.memory is not None and any(tensor.requires_grad for tensor in self.memory):
            raise ValueError(
                f"a cache with a graph cannot be copied by copy.deepcopy: call cache.detach_() "
                f"first, or cache.clone(), which copies without the graph; {CARRY}"
            )
        memo[id(self)] = twin = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def reset(self):
        if self.memory is None:
            return
        self.memory = type(self.memory)(*map(torch.zeros_like, self.memory))
        if self.layer_idx == 0:
            self.state.reset()

    def reorder_cache(self, beam_idx):
        self.map_tensors(lambda t: t.index_select(0, beam_idx.to(t.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats):
        self.map_tensors(lambda t: t.repeat_interleave(repeats, dim=0))

    def activate_past_recording(self):
        """Keep from now on what `crop` needs to go back beyond the beginning of a window."""
        self.record_past = True

    def crop(self, tokens_to_remove):
        """Remove the last columns; how many is given as a negative number."""
        croppable = 0 if self.state is None else self.state.croppable
        if self.layer_idx == 0:
            if not 0 <= -tokens_to_remove <= croppable:
                raise ValueError(
                    f"crop({tokens_to_remove}): give how many columns to remove as a negative "
                    f"number, at most the last {croppable}; to go back further, clone the memory "
                    f"before reading on"
                )
            if self.state is not None:
                self.state.crop(-tokens_to_remove)
        for rows, snapshot in [] if self.state is None else self.state.restored:
            pairs = zip(snapshot.memories[self.layer_idx], self.memory, strict=True)
            self.memory = type(self.memory)(*(where_rows(rows, old, new) for old, new in pairs))

    def offload(self):
        if self.memory is not None:
            self.memory = type(self.memory)(*(tensor.to("cpu") for tensor in self.memory))

    def prefetch(self):
        if self.memory is not None:
            device = self.state.recent.device
            self.memory = type(self.memory)(*(tensor.to(device) for tensor in self.memory))


class StaticWindowMemoryLayer(WindowMemoryLayer):
    """The same in tensors that stay where they are, for steps that are compiled once."""

    _layer_type = None  # in the list of static layers, below
    is_compileable = True
    is_croppable = False
    state_class = StaticCacheState

    def begin(self, memory, state, layer_idx):
        super().begin(memory, state, layer_idx)
        if not torch.compiler.is_compiling():
            for tensor in (*memory, *(state.tensors if layer_idx == 0 else ())):
                torch._dynamo.mark_static_address(tensor)

    def store(self, memory, keep_old=False):
        self._unlock()
        for held, new in zip(self.memory, memory, strict=True):
            if not shares_storage(new, held):
                held[leading_slots(new)] = new
        self.is_initialized = True

    def _unlock(self):
        if any(map(is_locked_inference_tensor, self.memory)):
            self.memory = type(self.memory)(*map(torch.clone, self.memory))

    def map_tensors(self, function):
        super().map_tensors(lambda tensor: copy_if_equal_shape(tensor, function(tensor)))

    def reset(self):
        if self.memory is None:
            return
        self._unlock()
        for tensor in self.memory:
            tensor.zero_()
        if self.layer_idx == 0:
            self.state.reset()

    def activate_past_recording(self):
        raise ValueError("StaticCache does not support crop(): use the default cache")

    def crop(self, tokens_to_remove):
        if tokens_to_remove != 0:
            raise ValueError("StaticCache does not support crop(): use the default cache")


STATIC_LAYER_TYPE_MAPPING["window_memory"] = StaticWindowMemoryLayer
CACHE_LAYER_CLASSES = {WindowMemoryLayer.__name__, StaticWindowMemoryLayer.__name__}


class MelodiCache(DynamicCache):
    """The memory of a model during generation, of fixed size however long the document.

    Make it with the model's config, `MelodiCache(model.config)`, and pass it as `cache`.
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
        extras, state = {}, shared_state(self)
        if state is not None:
            extras = {f"forgotten.{kind}": n for kind, n in state.progress.forgotten.items()}
            extras |= {"recent": state.recent, "output": state.output}
            if not state.has_last_hidden:
                extras["knows_output"] = torch.tensor(False)
        save_memory_file(self, path, dtype=dtype, model=model, extras=extras)

    @classmethod
    def load(cls, path, device=None, dtype=None, model=None) -> "MelodiCache":
        """Load a cache from a file that `save` wrote; a model that reads with it must fit.

        device: where the tensors go, by default the CPU.
        dtype: of the numbers; None gives each the type that it had when it was saved.
        model: the one that continues: device and dtype default to its own, and it is refused here
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
        output, recent = saved.extras["output"], saved.extras["recent"]
        state = CacheState(saved.config["window_length"], output, recent.device)
        state.progress = Progress(saved.tokens_read, saved.fill, forgotten)
        state.recent, state.columns = recent, saved.columns
        state.has_last_hidden = bool(saved.extras.get("knows_output", True))
        cache._begin(saved.layers, state)
        return cache

    def _begin(self, memories, state):
        for i, (layer, memory) in enumerate(zip(self.layers, memories, strict=True)):
            layer.begin(memory, state, i)
            layer.is_initialized = True

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
        check_dropout(model)
        decoder = model.get_decoder()
        cache, held = cls(decoder.config), decoder.to_generation(memory)
        tokens_read = held.progress.tokens_read
        shape = len(tokens_read), 1, decoder.config.hidden_size
        output = torch.zeros(shape, dtype=model.dtype, device=tokens_read.device)
        state = CacheState(decoder.config.window_length, output, tokens_read.device)
        state.progress, state.columns = held.progress, int(tokens_read.max())
        state.has_last_hidden = state.columns == 0
        cache._begin(held.layers, state)
        return cache

    def to_memory(self, model):
        """Convert to the memory that training carries, for `model(..., memory=...)`.

        It continues exactly where the cache ended, shares no tensor with it and has no graph.

        Raises `ValueError` for a cache that has read nothing or belongs to another model; and for
        one of a system whose training needs hidden states that generation does not keep (MELODI
        with long-term memory, Compressive Transformer), unless it came from `from_memory`.
        """
        state, decoder = shared_state(self), model.get_decoder()
        if state is None:
            raise ValueError("the cache has read no token yet: training begins with memory=None")
        check_memory_of(self.config_fields, decoder.config)
        return decoder.to_training([layer.memory for layer in self.layers], state.progress)

    def memory_bytes(self) -> int:
        """Bytes of the memories."""
        return memory_bytes(self)

    def clone(self) -> "MelodiCache":
        """Copy the cache without its graph; the copies are independent."""
        return clone_cache(self)

    def detach_(self):
        """Detach everything that is held from its graph."""
        for layer in self.layers:
            layer.map_tensors(torch.Tensor.detach)
        return self

    def to(self, *args, **kwargs):
        """Move, or change the type of, the floating-point numbers; counters keep theirs."""

        def move(tensor):
            device = torch.empty(0).to(*args, **kwargs).device
            return tensor.to(*args, **kwargs) if tensor.is_floating_point() else tensor.to(device)

        for layer in self.layers:
            layer.map_tensors(move)
        return self


def shared_state(cache):
    """Return the `CacheState` of a cache, None if there is no cache or it has read nothing."""
    layers = getattr(cache, "layers", None)
    return getattr(layers[0], "state", None) if layers else None


def clone_cache(cache):
    """Copy a cache of this library; the copy shares no tensor with it and has no graph."""

    def clone(tensor):
        return tensor.detach().clone()

    twin, state = copy.copy(cache), copy.copy(shared_state(cache))
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    if state is not None:
        CacheState.map_tensors(state, clone)
        state.columns = copy.deepcopy(state.columns)
        for layer in twin.layers:
            layer.memory, layer.state = type(layer.memory)(*map(clone, layer.memory)), state
    return twin


@contextmanager
def mid_window(cache):
    """Promise that calls inside are one token per row that begins and completes no window."""
    state = shared_state(cache)
    state.progress = state.progress._replace(is_mid_window=True)
    try:
        yield
    finally:
        state.progress = state.progress._replace(is_mid_window=False)


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
    if cache.layers and (not kinds <= CACHE_LAYER_CLASSES or len(cache.layers) != num_layers):
        raise ValueError(
            f"the cache holds {len(cache.layers)} layers ({', '.join(sorted(kinds))}) and "
            f"this model has {num_layers}: give MelodiCache(model.config), or nothing (prefix "
            f"tuning cannot write to a memory; prompt tuning can)"
        )


def fetch_memory(cache, layers, x):
    """Read the memories in a cache and how far its rows have read.

    layers: the model's; x: B T D, whose device, type and batch size an empty cache takes.
    """
    check_cache(cache, len(layers))
    if len(cache.layers) == 0:  # DynamicCache() without a config
        cache.layers = [WindowMemoryLayer() for _ in layers]
    if isinstance(cache, MelodiCache):
        check_memory_of(cache.config_fields, layers[0].config)
    held_layers = cast(list[WindowMemoryLayer], cache.layers)
    if held_layers[0].memory is None:
        device, length = "cpu" if cache.offloading else x.device, layers[0].config.window_length
        state = held_layers[0].state_class(length, torch.zeros_like(x[:, :1]), x.device)
        for i, (held, layer) in enumerate(zip(held_layers, layers, strict=True)):
            empty = layer.empty_memory(len(x), device, x.dtype, for_generation=True)
            held.begin(empty, state, i)
    check_cache_of(cache, layers, x)
    if torch.is_grad_enabled() and not (is_traced() or layers[0].gradient_checkpointing):
        check_graph(held_layers)
    pairs = zip(layers, held_layers, strict=True)
    return tuple(layer.cast(held.memory, x.dtype) for layer, held in pairs), shared_state(
        cache
    ).progress


def store_memory(cache, memory, plan, records, output, input_ids, mask):
    """Write the memory after a call back into the cache.

    records: per layer, a `StepOutput` per step, if snapshots are taken; output: B T D; input_ids:
    B T, or None if embeddings were read; mask: B T, true at tokens, None if all are.
    """
    state, record_past = shared_state(cache), cache.layers[0].record_past
    if record_past:
        output = torch.cat((state.output, output.detach()), dim=1)[:, -RECENT:]
    else:
        output = output[:, -1:].detach().clone()  # a view would keep all of it
    recent = state.recent
    if input_ids is None:
        input_ids = recent.new_full((len(recent), plan.num_columns), UNKNOWN_ID)
    if mask is not None:
        input_ids = input_ids.masked_fill(~mask, PADDING_ID)
    recent = torch.cat((recent, input_ids.to(recent.device)), dim=1)[:, -RECENT:]
    snapshots = take_snapshots(cache, plan, records) if record_past else []
    state.store(memory.progress, recent, output, plan.num_columns, snapshots)
    for held, new in zip(cache.layers, memory.layers, strict=True):
        held.store(new, keep_old=bool(snapshots))


def take_snapshots(cache, plan, records):
    """Collect the memories of all layers and rows when windows were full in this call."""
    snapshots, everyone = [], torch.zeros_like(shared_state(cache).progress.tokens_read)
    for i, step in enumerate(plan.steps):
        if not step.closes:
            continue
        memories = [join_parts(each[i].snapshot) for each in records]
        closing, end = step.is_closing, step.tokens_after
        if step.rows is not None:
            pairs = zip(cache.layers, memories, strict=True)
            memories = [step.update_rows(held.memory, held.memory, m) for held, m in pairs]
            closing = everyone.bool().index_copy(0, step.rows, closing)
            end = everyone.index_copy(0, step.rows, end)
        snapshots.append(WindowSnapshot(closing, end, tuple(memories)))
    return snapshots


def check_cache_of(cache, layers, x):
    """Raise `ValueError` if a cache holds other rows than x or the memory of another model."""
    rows = cache.layers[0].batch_size
    if rows != len(x):
        raise ValueError(
            f"the cache holds {rows} rows and the batch has {len(x)}: repeat or select rows "
            f"with batch_repeat_interleave or batch_select_indices, or begin with an empty cache"
        )
    for i, (held, layer) in enumerate(zip(cache.layers, layers, strict=True)):
        optional = {name: 1 for name, field in layer.carried_items() if field.held_in == "training"}
        check_layer_memory(i, held.memory, layer.memory_shapes(for_generation=True), optional)


def check_graph(layers):
    """Raise `ValueError` for memories whose graph was freed by an earlier backward."""
    nodes = ([t.grad_fn for t in layer.memory if t.grad_fn is not None] for layer in layers)
    first = next(filter(None, nodes), [])  # those of other layers are part of the same graph
    if any(map(is_freed, first)):
        raise ValueError(
            f"the cache holds the graph of a call whose backward has freed it: call "
            f"cache.detach_() after each backward; {CARRY}"
        )


def is_freed(node):
    """Whether a backward has freed the graph of a node."""
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
        following = [n for n, _ in node.next_functions if n not in nodes]
        nodes += following[: MAX_GRAPH_NODES - len(nodes)]
    return False


def leading_slots(tensor):
    """An index of the leading slots of a larger tensor."""
    return tuple(slice(0, size) for size in tensor.shape)


def copy_if_equal_shape(tensor, new):
    """Write `new` into a tensor of its shape, and return that; otherwise return `new`."""
    return tensor.copy_(new) if new.shape == tensor.shape else new


def shares_storage(new, held):
    """Whether nothing changed, or was written in place."""
    if new is held:
        return True
    if is_traced() or new.stride() != held.stride():
        return False
    return new.data_ptr() == held.data_ptr() and new.dtype == held.dtype


def copy_padded(held, new):
    """Copy `new` into a tensor of its own, of the shape of `held`."""
    return pad_to_shape(new, held.shape).clone()


def write_leading_slots(held, new):
    """Write `new` into the leading slots of `held`, or, where torch forbids it, make a new one."""
    if shares_storage(new, held):
        return held
    has_graph = new.requires_grad or held.requires_grad
    moved = new.dtype != held.dtype or new.device != held.device
    is_locked = is_locked_inference_tensor(held) or is_transformed()
    if has_graph or moved or is_locked or new.shape == held.shape:
        return pad_to_shape(new, held.shape)
    held[leading_slots(new)] = new
    return held
