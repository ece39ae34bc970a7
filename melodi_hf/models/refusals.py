"""What the models refuse: each message names the value, what is allowed, and the remedy."""

import torch

from .tracing import is_traced


def real_columns(attention_mask, x, cache):
    """The mask of this call's columns (B T, bool), or None if all are real tokens."""
    if attention_mask is None:
        return None
    batch_size, columns = x.shape[:2]
    if is_traced():
        return attention_mask[:, -columns:].bool()
    past = 0 if cache is None else int(cache.get_seq_length())
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: it must be {batch_size} rows "
            f"of 0 at padding and 1 at tokens; masks of other shapes (4-D ones, say) cannot be "
            f"followed by a memory"
        )
    if attention_mask.shape[1] not in (columns, past + columns):
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns: it must have {columns}, one "
            f"per token of this call, or {past + columns}, with the {past} that the memory has read"
        )
    mask = attention_mask[:, -columns:].bool()
    if (
        _is_free_to_look_at(attention_mask)
        and not ((attention_mask == 0) | (attention_mask == 1)).all()
    ):
        raise ValueError(
            "attention_mask holds numbers other than 0 and 1: give 1 at tokens and 0 at padding; "
            "masks that are added to scores cannot be followed by a memory"
        )
    return None if mask.all() else mask


def refuse_packed_rows(mask, position_ids=None, seq_idx=None, cu_seq_lens_q=None, **_):
    """Several documents in one row would leak into each other through the memory."""
    if is_traced():
        return
    if cu_seq_lens_q is not None and len(cu_seq_lens_q) > 2:
        _refuse_packed("cu_seq_lens_q", 0, int(cu_seq_lens_q[1]))
    for name, given in (("position_ids", position_ids), ("seq_idx", seq_idx)):
        if given is None or given.dim() != 2:
            continue
        goes_on = given.diff() > 0 if name == "position_ids" else given.diff() == 0
        breaks = ~goes_on if mask is None else ~goes_on & mask[:, 1:] & mask[:, :-1]
        if breaks.any():
            row, column = breaks.nonzero()[0].tolist()
            _refuse_packed(name, row, column + 1)


def _refuse_packed(name, row, column):
    raise ValueError(
        f"{name} restart in row {row} at column {column}: several documents packed into one row "
        f"would leak through the memory; give each its own row (packing=False), or read them in "
        f"turn with reset_memory"
    )


def refuse_empty_rows(mask):
    """After tokens were taken back, what comes next is known once a row has read another token."""
    empty = (~mask).all(1)
    if empty.any():
        raise ValueError(
            f"row {int(empty.nonzero()[0])} has nothing but padding right after crop() or "
            f"MelodiCache.from_memory(): give each row at least 1 token"
        )


def refuse_unknown_ids(input_ids, vocab_size):
    """Checked where it costs no synchronisation; a GPU stops with its own assertion."""
    is_tensor = isinstance(input_ids, torch.Tensor)
    if not is_tensor or input_ids.dtype not in (torch.int64, torch.int32):
        found = input_ids.dtype if is_tensor else type(input_ids).__name__
        raise ValueError(
            f"input_ids are {found}: they must be a tensor of whole numbers, torch.long or "
            f"torch.int (numbers with a fraction go into inputs_embeds)"
        )
    if _is_free_to_look_at(input_ids):
        _refuse_unknown("input_ids", input_ids, vocab_size)


def _is_free_to_look_at(ids):
    return ids.device.type == "cpu" and not is_traced()


def _refuse_unknown(name, ids, vocab_size):
    if ids.numel() == 0:
        return
    least, greatest = (int(end) for end in ids.aminmax())
    if least < 0 or greatest >= vocab_size:
        wrong = least if least < 0 else greatest
        raise ValueError(
            f"{name} contain {wrong}: the vocabulary has the ids 0 to {vocab_size - 1}; use the "
            f"tokenizer that was saved with the model"
        )


def refuse_bad_labels(inputs, labels, shift_labels, vocab_size):
    """Labels are one per input token: ids of the vocabulary, or -100."""
    for name, given in (("labels", labels), ("shift_labels", shift_labels)):
        if given is not None and inputs is not None and given.shape != inputs.shape[:2]:
            raise ValueError(
                f"{name} have shape {tuple(given.shape)} and the input {tuple(inputs.shape[:2])}: "
                f"give one label per token, -100 where there is none"
            )
        if given is not None and _is_free_to_look_at(given):
            _refuse_unknown(name, given[given != -100], vocab_size)


def refuse_bad_reset(reset_memory, batch_size):
    """Which rows begin a new document is said by a mask of the rows."""
    is_mask = isinstance(reset_memory, torch.Tensor) and reset_memory.dtype == torch.bool
    if not is_mask or reset_memory.shape != (batch_size,):
        raise ValueError(
            f"reset_memory is {reset_memory!r}: it must be a tensor of booleans, one for each of "
            f"the {batch_size} rows, true where a new document begins"
        )


def refuse_foreign_memory(memory, layers, batch_size):
    """A memory fits the model that wrote it and the batch size it was written with."""
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
        refuse_foreign_layer(i, held, layer.memory_shapes(), layer.window_axis)


def refuse_dropout(model):
    """What is read with dropout is another memory every time."""
    rates = {name: getattr(model.config, name) for name in ("dropout", "attention_dropout")}
    if model.training and any(rates.values()):
        shown = ", ".join(f"{name}={rate}" for name, rate in rates.items())
        raise ValueError(
            f"the model is in training mode with {shown}: call model.eval() before reading, "
            f"model.train() after"
        )


def refuse_unforgettable(memory, windows, kept):
    """What is taken out of a memory is one of its kinds, in whole windows.

    windows: kind -> the windows that are to stay; kept: kind -> those that the model holds.
    """
    for kind, count in windows.items():
        if kind not in kept:
            raise ValueError(
                f"there is no {kind}-term memory to forget: this model has "
                f"{' and '.join(kept) or 'none of any kind'}"
            )
        if count < 0:
            raise ValueError(f"{kind}={count} windows should stay: give 0 or more")
        if count > 0 and kept[kind] == float("inf"):
            raise ValueError(
                f"{kind}={count} windows should stay, but the {kind}-term memory of this model "
                f"sums up the whole past, in which no window can be told from another: empty it "
                f"with {kind}=0, or leave it as it is"
            )
    if memory.progress.fill != 0:
        raise ValueError(
            "memory was taken amid a window: forget where the tokens read are a whole number of "
            "windows in every row"
        )


def refuse_infinite_weights(named_weights, origin):
    """A model with a NaN in it answers NaN to everything, without a word of where it came from."""
    for name, weight in named_weights:
        is_plain = type(weight.data) is torch.Tensor  # integers in disguise (torchao) hold no NaN
        if weight.is_meta or not is_plain or not weight.is_floating_point():
            continue
        if weight.isfinite().all():
            continue
        bad = int((~weight.isfinite()).sum())
        raise ValueError(
            f"{bad} of the {weight.numel()} numbers of {name} in {origin} are NaN or infinite: the "
            f"file is damaged or the training diverged; load an earlier checkpoint"
        )


def refuse_foreign_layer(i, held, shapes, window_axis):
    """Refuse the memory of layer `i` if it was written by another model.

    held: a NamedTuple of tensors; shapes: field -> what its shape should be, without rows;
    window_axis: fields that grow with the open window -> the axis that does.
    """
    if held._fields != tuple(shapes):
        raise ValueError(
            f"memory of layer {i} has the fields {', '.join(held._fields)} and this model's "
            f"{', '.join(shapes)}: it is that of another model"
        )
    for name, shape in shapes.items():
        tensor, free = getattr(held, name), window_axis.get(name)
        pairs = enumerate(zip(tensor.shape[1:], shape, strict=True), start=1)
        if any(have != want for axis, (have, want) in pairs if axis != free):
            raise ValueError(
                f"memory of layer {i}, {name}, has shape {tuple(tensor.shape)} and this model's "
                f"(rows, {', '.join(map(str, shape))}): it is that of another model"
            )
