"""Check what the user gives, and hide differences of transformers 5.17 to 5.24.

up to 5.23   calls and outputs name the cache `past_key_values`: `CACHE_NAME`
from 5.24    they name it `cache`; the old name is deprecated (in generate() and models until 6.0)
all          some keywords are passed to every model that accepts any: `HARMLESS_KEYWORDS`

Our own functions accept both names on all versions. Messages name the value, what is allowed, and
the remedy. Values are looked at on a CPU only, where this costs no synchronisation.
"""

import re
import warnings

import torch
from torch import Tensor
from transformers import __version__
from transformers.modeling_outputs import BaseModelOutputWithPast

from .kernels import is_traced

NEWEST_TESTED = (5, 24)  # the newest minor version of transformers that the test suite passed on
NEWEST = ".".join(map(str, NEWEST_TESTED))

# The installed library's name of the cache: an argument of its functions, a field of its outputs.
CACHE_NAME = (
    "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
)

# Keywords that are accepted by forward() though its signature does not name them. All others raise,
# so that an argument that transformers renames is not ignored.
HARMLESS_KEYWORDS = {
    "position_ids": "generate() numbers the columns; we count tokens, and refuse restarts",
    "logits_to_keep": "TRL passes it to the base model, too, which has no logits",
    "tokenizer": "generate() passes it to every step; it is for stop strings and token healing",
    "token_type_ids": "tokenizers of no particular class return it; there is one type of token",
    "output_attentions": "read from the keywords by the model and by `capture_outputs`",
    "output_hidden_states": "read from the keywords by the model and by `capture_outputs`",
    "output_router_logits": "TRL and generate() pass it to every model; there are no experts",
    "num_items_in_batch": "the Trainer passes it to the loss",
    "ignore_index": "goes to the loss, as in the library's own loss functions",
    "is_causal": "integrations set it for every model; False is refused",
    "return_dict": "the decorators of forward() take it out; a subclass may come without them",
    "cu_seq_lens_q": "marks packed rows, which are refused",
    "cu_seq_lens_k": "comes with `cu_seq_lens_q`",
    "max_length_q": "comes with `cu_seq_lens_q`",
    "max_length_k": "comes with `cu_seq_lens_q`",
    "seq_idx": "marks packed rows, which are refused",
}


def require(condition, message, error: type[Exception] = ValueError):
    """Raise an error with this message unless a condition holds."""
    if not condition:
        raise error(message)


# Versions of transformers


def warn_if_untested(version):
    """Warn of a version of transformers that is newer than the newest one tested."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and tuple(map(int, found.groups())) > NEWEST_TESTED:
        warnings.warn(
            f"melodi_hf was tested with transformers up to {NEWEST}, and this is {version}: if "
            f"something fails, install transformers=={NEWEST}.*",
            stacklevel=3,
        )


def choose_cache(cache, past_key_values):
    """Return the cache that was passed under one of its two names, or None.

    Raises `ValueError` if both are passed and differ.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError(
            "cache and past_key_values are both given: they are two names of the same argument; "
            "pass one of them"
        )
    return past_key_values if cache is None else cache


def rename_cache(kwargs):
    """Return `kwargs` with the cache, if it is there, under the installed library's name for it."""
    names = ("cache", "past_key_values")
    rest = {name: value for name, value in kwargs.items() if name not in names}
    if len(rest) == len(kwargs):
        return rest
    return rest | {CACHE_NAME: choose_cache(*(kwargs.get(name) for name in names))}


def give_both_cache_names(output_class):
    """Let a class of outputs give its cache under both names; from 5.24 on the library does."""
    if CACHE_NAME == "past_key_values":
        get = output_class.__getitem__
        output_class.cache = property(lambda self: self.past_key_values)
        output_class.__getitem__ = lambda self, key: get(
            self, CACHE_NAME if key == "cache" else key
        )
    return output_class


def check_keywords(kwargs):
    """Raise `TypeError` for a keyword of forward() that nothing would read."""
    unknown = kwargs.keys() - HARMLESS_KEYWORDS.keys()
    if unknown:
        raise TypeError(
            f"forward() got an unknown keyword: {', '.join(sorted(unknown))}. Pass the arguments "
            f"that its signature names (the cache is `cache` or `past_key_values`). If "
            f"transformers {__version__} passed it, install a version up to {NEWEST}, which this "
            f"library was tested with"
        )
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal is False: these models are causal; leave it out")


def check_cache_has_grown(cache, is_first):
    """Raise `RuntimeError` if a step of generate() did not write to its cache.

    cache: that of this step, or None; is_first: whether this is surely the first step. How many
    columns the cache has read is noted on it (generate() clears the note) for the next step.
    """
    if cache is None:
        columns, before = None, None
    else:
        columns, before = cache.get_seq_length(), getattr(cache, "columns_at_last_step", None)
        if isinstance(columns, Tensor) and columns.device.type != "cpu" and cache.is_initialized:
            return  # to read the number, the host would wait for the device
        cache.columns_at_last_step = columns = int(columns)
    if (cache is None and not is_first) or (before is not None and columns <= before):
        found = "no cache" if cache is None else f"a cache that still holds {columns} columns"
        raise RuntimeError(
            f"generate() of transformers {__version__} continues with {found} after a step: the "
            f"next tokens would ignore those before them. Install transformers up to {NEWEST}, or "
            f"pass use_cache=False"
        )


# Inputs of a call


def check_inputs(input_ids, inputs_embeds, hidden_size):
    """Raise `ValueError` unless ids or embeddings are given, and have tokens."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    given = inputs_embeds if input_ids is None else input_ids
    shape = tuple(given.shape)
    is_wrong = len(shape) != 3 or shape[-1] != hidden_size
    if is_wrong if input_ids is None else len(shape) != 2:
        raise ValueError(
            f"the input has shape {shape}: input_ids are rows and columns, inputs_embeds rows, "
            f"columns and {hidden_size} channels"
        )
    if shape[0] == 0:
        raise ValueError(f"the input has shape {shape}, the batch has 0 rows: give at least 1")
    if shape[1] == 0:
        raise ValueError("the call has 0 tokens: give at least 1 per row")


def check_token_ids(input_ids, vocab_size):
    """Raise `ValueError` for ids outside the vocabulary; a GPU stops with its own assertion."""
    is_tensor = isinstance(input_ids, Tensor)
    if not is_tensor or input_ids.dtype not in (torch.int64, torch.int32):
        found = input_ids.dtype if is_tensor else type(input_ids).__name__
        raise ValueError(
            f"input_ids are {found}: they must be a tensor of whole numbers, torch.long or "
            f"torch.int (numbers with a fraction go into inputs_embeds)"
        )
    _check_vocabulary("input_ids", input_ids, vocab_size)


def check_labels(inputs, labels, shift_labels, vocab_size):
    """Raise `ValueError` unless there is one label per token: an id of the vocabulary, or -100."""
    for name, given in (("labels", labels), ("shift_labels", shift_labels)):
        if given is None:
            continue
        if inputs is not None and given.shape != inputs.shape[:2]:
            raise ValueError(
                f"{name} have shape {tuple(given.shape)} and the input {tuple(inputs.shape[:2])}: "
                f"give one label per token, -100 where there is none"
            )
        _check_vocabulary(name, given, vocab_size, ignored=-100)


def may_read_values(tensor):
    """Whether the values of a tensor can be read without waiting for a device."""
    return tensor.device.type == "cpu" and not is_traced()


def _check_vocabulary(name, ids, vocab_size, ignored=None):
    if not may_read_values(ids):
        return
    ids = ids if ignored is None else ids[ids != ignored]
    least, greatest = (int(end) for end in ids.aminmax()) if ids.numel() else (0, 0)
    if least < 0 or greatest >= vocab_size:
        raise ValueError(
            f"{name} contain {least if least < 0 else greatest}: the vocabulary has the ids 0 to "
            f"{vocab_size - 1}; use the tokenizer that was saved with the model"
        )


def column_mask(attention_mask, x, columns_before):
    """Return the mask of this call's columns (B T, bool), or None if all are tokens.

    x: B T ...; columns_before: that the cache has read, padding included.
    """
    if attention_mask is None:
        return None
    rows, columns = x.shape[:2]
    if is_traced():
        return attention_mask[:, -columns:].bool()
    if attention_mask.dim() != 2 or attention_mask.shape[0] != rows:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: it must be {rows} rows of 0 "
            f"at padding and 1 at tokens; masks of other shapes (4-D ones, say) are not supported"
        )
    before = int(columns_before)
    if attention_mask.shape[1] not in (columns, before + columns):
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns: it must have {columns}, one "
            f"per token of this call, or {before + columns}, with the {before} that the memory has "
            f"read"
        )
    is_binary = (attention_mask == 0) | (attention_mask == 1)
    if may_read_values(attention_mask) and not is_binary.all():
        raise ValueError(
            "attention_mask holds numbers other than 0 and 1: give 1 at tokens and 0 at padding; "
            "masks that are added to scores are not supported"
        )
    mask = attention_mask[:, -columns:].bool()
    return None if mask.all() else mask


def check_not_packed(mask, position_ids=None, seq_idx=None, cu_seq_lens_q=None, **_):
    """Raise `ValueError` if several documents are packed into one row."""
    if is_traced():
        return
    if cu_seq_lens_q is not None and len(cu_seq_lens_q) > 2:
        _raise_packed("cu_seq_lens_q", 0, int(cu_seq_lens_q[1]))
    for name, given in (("position_ids", position_ids), ("seq_idx", seq_idx)):
        if given is None or given.dim() != 2:
            continue
        continues = given.diff() > 0 if name == "position_ids" else given.diff() == 0
        breaks = ~continues if mask is None else ~continues & mask[:, 1:] & mask[:, :-1]
        if breaks.any():
            row, column = breaks.nonzero()[0].tolist()
            _raise_packed(name, row, column + 1)


def _raise_packed(name, row, column):
    raise ValueError(
        f"{name} restart in row {row} at column {column}: several documents packed into one row "
        f"would leak through the memory; give each its own row (packing=False), or read them in "
        f"turn with reset_memory"
    )


def check_no_empty_rows(mask):
    """Raise `ValueError` for rows of padding where the last hidden state is not known."""
    empty = (~mask).all(1)
    if empty.any():
        raise ValueError(
            f"row {int(empty.nonzero()[0])} has nothing but padding right after crop() or "
            f"MelodiCache.from_memory(): give each row at least 1 token"
        )


# Memories


def check_reset_memory(reset_memory, batch_size):
    """Raise `ValueError` unless `reset_memory` is a mask of the rows."""
    is_mask = isinstance(reset_memory, Tensor) and reset_memory.dtype == torch.bool
    if not is_mask or reset_memory.shape != (batch_size,):
        raise ValueError(
            f"reset_memory is {reset_memory!r}: it must be a tensor of booleans, one for each of "
            f"the {batch_size} rows, true where a new document begins"
        )


def check_memory(memory, layers, batch_size):
    """Raise `ValueError` unless a memory of training fits the model's layers and the batch."""
    if not hasattr(memory, "progress"):
        convert = ", or convert a MelodiCache, cache.to_memory(model)"
        raise ValueError(
            f"memory is a {type(memory).__name__}: give what a call with return_memory=True "
            f"returned{convert if hasattr(memory, 'get_seq_length') else ''}"
        )
    if len(memory.layers) != len(layers):
        raise ValueError(
            f"memory has {len(memory.layers)} layers and this model {len(layers)}: it is that of "
            f"another model"
        )
    rows = memory.progress.tokens_read.shape[0]
    if rows != batch_size:
        raise ValueError(
            f"memory holds {rows} rows and the batch has {batch_size}: read both with the same "
            f"batch size, or begin with memory=None"
        )
    for i, (layer, held) in enumerate(zip(layers, memory.layers, strict=True)):
        window_axes = {name: field.window_axis for name, field in layer.carried_items()}
        check_layer_memory(i, held, layer.memory_shapes(), window_axes)


def check_layer_memory(i, held, shapes, free_axes):
    """Raise `ValueError` if the memory of layer `i` was written by another model.

    Args:
        held: a NamedTuple of tensors.
        shapes: field -> its shape without rows.
        free_axes: field -> an axis whose size may differ.
    """
    if held._fields != tuple(shapes):
        raise ValueError(
            f"memory of layer {i} has the fields {', '.join(held._fields)} and this model's "
            f"{', '.join(shapes)}: it is that of another model"
        )
    for (name, shape), tensor in zip(shapes.items(), held, strict=True):
        pairs = enumerate(zip(tensor.shape[1:], shape, strict=True), start=1)
        if any(have != want for axis, (have, want) in pairs if axis != free_axes.get(name)):
            raise ValueError(
                f"memory of layer {i}, {name}, has shape {tuple(tensor.shape)} and this model's "
                f"(rows, {', '.join(map(str, shape))}): it is that of another model"
            )


def check_forget(memory, windows, held):
    """Raise `ValueError` unless whole windows of existing kinds are to be kept.

    windows: kind -> windows to keep; held: kind -> those that the model holds.
    """
    for kind, count in windows.items():
        if kind not in held:
            raise ValueError(
                f"there is no {kind}-term memory to forget: this model has "
                f"{' and '.join(held) or 'none of any kind'}"
            )
        if count < 0:
            raise ValueError(f"{kind}={count} windows to keep: give 0 or more")
        if count > 0 and held[kind] == float("inf"):
            raise ValueError(
                f"{kind}={count} windows to keep, but the {kind}-term memory of this model is a "
                f"summary of the whole past, in which windows cannot be separated: empty it with "
                f"{kind}=0, or leave it as it is"
            )
    if memory.progress.offset != 0:
        raise ValueError(
            "memory was returned within a window: forget where the tokens read are a whole number "
            "of windows in every row"
        )


# Models


def check_dropout(model):
    """Raise `ValueError` for a model that would read with dropout."""
    rates = {name: getattr(model.config, name) for name in ("dropout", "attention_dropout")}
    if model.training and any(rates.values()):
        shown = ", ".join(f"{name}={rate}" for name, rate in rates.items())
        raise ValueError(
            f"the model is in training mode with {shown}: call model.eval() before reading, "
            f"model.train() after"
        )


def check_finite_weights(named_weights, origin):
    """Raise `ValueError` for a weight that is NaN or infinite."""
    for name, weight in named_weights:
        is_dense = type(weight.data) is Tensor  # integers of torchao hold no NaN
        if weight.is_meta or not is_dense or not weight.is_floating_point():
            continue
        if not weight.isfinite().all():
            raise ValueError(
                f"{int((~weight.isfinite()).sum())} of the {weight.numel()} numbers of {name} in "
                f"{origin} are NaN or infinite: the file is damaged or the training diverged; load "
                f"an earlier checkpoint"
            )
