"""The seam: what a memory architecture implements, and the layer that all of them share.

A layer reads its call window by window (`windows.Plan`). Between windows it carries a memory, a
NamedTuple of tensors with rows first, which is a value: it is passed in and returned.

    memory, or its  --recall-->  context --+
    keys and values                        v
    tokens x  -------- norm, k, v -----> [ context | window ] --attend--> + x, feed-forward --> x'
                                           |
                                           v  the window is full
                                         close  -->  memory of the next window, summary tokens

A subclass defines `memory_fields`, `attend` and `close`, and if it needs them `begin_call`,
`recall` and `metrics`.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .modules import Attention, FeedForward, RMSNorm, merge_heads
from .windows import StepOutput, join_parts, pad_to_shape


class Field(NamedTuple):
    """One tensor of a memory.

    Fields called `keys` and `values` hold [context | tokens of the open window]; `inputs` and
    `outputs` hold what the layer read and returned for these tokens. The shared code fills them.
    """

    shape: tuple[int, ...]  # without rows, in generation: all slots
    kind: str | None = None  # "short" or "long": what `forget` drops
    per_window: int | None = None  # slots that a window leaves; None: a summary of the whole past
    window_axis: int | None = None  # rows counted: the axis that has the open window's tokens
    between: int = 0  # slots along it between two windows, in training
    grows: bool = True  # with each token; or it has all slots while a window is open
    # Fields whose keys or values these are; training makes them at the beginning of each call.
    projected_from: tuple[str, ...] = ()
    held_in: str = "both"  # "training" or "generation": without slots in the other
    in_float32: bool = False  # bfloat16 is too coarse

    @property
    def is_rebuilt(self):
        """Whether training does not carry the context before the window."""
        return bool(self.projected_from) and self.window_axis is not None

    def shape_in(self, form):
        """Shape without rows, before the first token, in "training" or "generation"."""
        if self.window_axis is not None and form == "training":
            return with_slots(self.shape, self.window_axis - 1, self.between)
        if self.held_in not in ("both", form):
            return with_slots(self.shape, -2, 0)
        return self.shape

    def num_windows(self):
        """How many windows back it reaches, `math.inf` if it is a summary of the whole past."""
        slots = self.shape[-2] if self.window_axis is None else self.between
        return math.inf if self.per_window is None else -(-slots // max(1, self.per_window))

    def dtype(self, dtype):
        """The type of its numbers in a memory of another type."""
        return torch.promote_types(dtype, torch.float32) if self.in_float32 else dtype


class MemoryLayer(GradientCheckpointingLayer):
    """One layer of a memory transformer.

    Args:
        config: of the model.
        attention: attention to [context | window], a module.
    """

    def __init__(self, config, attention):
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn: Attention = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.fields = self.carried_fields = self.memory_fields()
        # Of the fields that grow with a window: their axis, and the slots before its tokens.
        self.window_axes = {
            name: (field.window_axis, field.shape[field.window_axis - 1] - config.window_length)
            for name, field in self.items()
            if field.window_axis is not None and field.grows
        }

    def items(self):
        """Pairs of a field's name and its `Field`."""
        return self.fields._asdict().items()

    def carried_items(self):
        """The same of what is carried between calls, if a layer inside this one has a memory."""
        return self.carried_fields._asdict().items()

    has_auxiliary_loss = False  # in training: zero in a call that completes no window

    # What an architecture implements.

    def memory_fields(self):
        """Return the layer's NamedTuple with a `Field` in place of each tensor (of the config)."""
        raise NotImplementedError

    def recall(self, memory, window):
        """Make the context of a window that begins: `keys` and `values` with nothing behind it."""
        return memory

    def attend(self, h, memory, window):
        """Attend to [context | window].

        Args:
            h: R T D, normalised tokens and summary tokens.
            memory: with their keys and values.
            window: a `Window`.

        Returns:
            R H T K, and the weights towards [context | window], or None (`window.return_weights`).
        """
        raise NotImplementedError

    def close(self, memory, summaries, window):
        """Make the memory of the next window, once this one is full.

        Args:
            memory: with all tokens of the window.
            summaries: R U D, its summary tokens after this layer.

        Returns:
            The memory, the summary tokens of the next layer, and an auxiliary loss (R) or None.
        """
        raise NotImplementedError

    def metrics(self, memory, windows_read) -> dict[str, Tensor]:
        """Compute numbers about a memory of training, each a mean over rows.

        windows_read: B, completed windows of each document.
        """
        return {}

    # What all architectures share.

    def forward(self, x, summaries, *memory, plan):
        """Read a call.

        Args:
            x: tokens in the order of the plan.
            summaries: N U D, summary tokens of the windows that may become full; U = 0 if none.
            memory: its tensors one by one, as gradient checkpointing wants them.

        Returns:
            x, summaries, the auxiliary loss or None, a `StepOutput` per step if attention weights
            or snapshots are asked for, else None, and the tensors of the memory.
        """
        given = type(self.fields)(*memory)
        held = self.project_carried(given) if plan.rebuilds_context else given
        num_summaries = summaries.shape[1]
        position_bias = partial(self.self_attn.position_bias, num_summaries=num_summaries)
        outputs, held = plan.run(self.read, position_bias, held, x, summaries)
        losses = [output.loss for output in outputs if output.loss is not None]
        computes_loss = self.has_auxiliary_loss and plan.trains
        return (
            plan.join([output.x for output in outputs]),
            plan.join_summaries([output.summaries for output in outputs]),
            sum(losses, x.new_zeros((), dtype=torch.float32)) if computes_loss else None,
            outputs if plan.records else None,
            *self.end_call(held, given, plan),
        )

    def project_carried(self, memory):
        """Make the keys and values of what training carries as hidden states."""
        names = [name for name, field in self.items() if field.projected_from]
        if not names:
            return memory
        sources = getattr(self.fields, names[0]).projected_from
        states = torch.cat([getattr(memory, name) for name in sources], dim=1)
        made = zip(names, self.project(states), strict=True)
        held = {name: (tensor, getattr(memory, name).to(tensor.dtype)) for name, tensor in made}
        return memory._replace(**{name: torch.cat(pair, dim=2) for name, pair in held.items()})

    def project(self, tokens):
        """Make keys and values of hidden states: B J D -> two of B H J K."""
        if tokens.shape[1] == 0:  # which not every kind of linear layer takes
            heads, per_head = self.config.num_attention_heads, self.config.head_dim
            empty = tokens.new_empty(tokens.shape[0], heads, 0, per_head)
            return empty, empty
        return self.self_attn.keys_values(self.dropout(self.input_layernorm(tokens)))

    def read(self, step, window, memory, x, summaries):
        """Read the tokens (R T D) and the summary tokens (R U D) of one step.

        Returns a `StepOutput` and the memory.
        """
        if step.opens:
            memory = step.merge_opened(self.recall(memory, window), memory)
        x = torch.cat((x, summaries), dim=1) if summaries.shape[1] else x
        normed = self.dropout(self.input_layernorm(x))
        memory = self.append(step, memory, inputs=x)
        keys, values = self.self_attn.keys_values(normed)
        extended = self.append(step, memory, keys=keys, values=values)
        attended, weights = self.attend(normed, extended, window)
        x = x + self.self_attn.o_proj(merge_heads(attended))
        x = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        memory = self.without_summaries(step, extended) if summaries.shape[1] else extended
        x, summaries = x.split((step.tokens, summaries.shape[1]), dim=1)
        memory = self.append(step, memory, outputs=x)
        output = StepOutput(x, summaries, None, weights, memory if step.closes else None)
        return self.end_window(step, window, output, memory) if step.closes else (output, memory)

    def end_window(self, step, window, output, memory):
        """Close the window in the rows in which it is full."""
        new, summaries, loss = self.close(memory, output.summaries, window)
        if loss is not None:
            loss = torch.where(step.is_closing, loss, 0).sum()
        new = new if step.keeps_parts else join_parts(new)
        memory = step.merge_closed(new, memory)
        closed = {
            name: step.empty_slots(getattr(memory, name), field.window_axis)
            for name, field in self.items()
            if field.window_axis is not None and field.between == 0 and not field.is_rebuilt
        }
        return output._replace(summaries=summaries, loss=loss), memory._replace(**closed)

    def append(self, step, memory, **new):
        """Append what a step adds to the fields of these names, if the layer has them."""
        return memory._replace(
            **{
                name: step.append(getattr(memory, name), tensor, *self.window_axes[name])
                for name, tensor in new.items()
                if name in self.window_axes
            }
        )

    def without_summaries(self, step, memory):
        """Remove the keys and values of summary tokens."""
        return memory._replace(
            **{
                name: step.without_summaries(getattr(memory, name), *self.window_axes[name])
                for name in ("keys", "values")
            }
        )

    def end_call(self, memory, given, plan):
        """Drop what training does not carry to the next call; `given`: the memory before it."""
        memory = join_parts(memory)
        if not plan.rebuilds_context:
            return memory
        dropped = {n: getattr(given, n) for n, f in self.items() if f.held_in == "generation"}
        for name in (name for name, field in self.items() if field.is_rebuilt):
            axis, context = self.window_axes[name]
            tensor = getattr(memory, name)
            slots = max(0, tensor.shape[axis] - context)
            dropped[name] = tensor.narrow(axis, tensor.shape[axis] - slots, slots)
        pairs = zip(memory._replace(**dropped), given, strict=True)
        # Copies, not views of longer tensors, which would be kept alive and FSDP warns of.
        as_is = torch.contiguous_format
        return [t if t is before else t.clone(memory_format=as_is) for t, before in pairs]

    # Forms of a memory: training carries what cannot be derived, a cache all that is read.

    def memory_shapes(self, for_generation=False):
        """The shape of each field before the first token, without rows."""
        form = "generation" if for_generation else "training"
        return {name: field.shape_in(form) for name, field in self.carried_items()}

    def empty_memory(self, batch_size, device, dtype, for_generation=False):
        """Make the memory before the first token."""
        shapes = self.memory_shapes(for_generation)
        return type(self.carried_fields)(
            **{
                name: torch.zeros(
                    batch_size, *shapes[name], device=device, dtype=field.dtype(dtype)
                )
                for name, field in self.carried_items()
            }
        )

    def cast(self, memory, dtype):
        """Convert a memory to another precision, except what is kept in float32."""
        pairs = zip(memory, self.carried_fields, strict=True)
        return type(memory)(*(tensor.to(field.dtype(dtype)) for tensor, field in pairs))

    def to_generation(self, memory):
        """Convert a memory from the form of training to that of a cache.

        Fields that a cache can do without are kept, so that `to_training` finds them.
        """
        memory = self.project_carried(memory)
        padded = {
            name: pad_to_shape(getattr(memory, name), (len(memory[0]), *field.shape))
            for name, field in self.carried_items()
            if field.window_axis is not None
        }
        return memory._replace(**padded)

    def to_training(self, memory, offset):
        """Convert a memory from the form of a cache to that of training.

        offset: tokens in the open window, None if the rows differ: then all its slots are kept.
        """
        kept = {}
        for name, field in self.carried_items():
            tensor, axis = getattr(memory, name), field.window_axis
            if field.held_in == "training" and tensor.shape[1:] != field.shape:
                raise ValueError(
                    f"the cache holds the long-term memory as keys and values, and training needs "
                    f"its hidden states ({name!r}), which do not follow from them: read the text "
                    f"with model(input_ids, memory=memory, return_memory=True), or into a cache "
                    f"that keeps both, MelodiCache.from_memory(model.get_decoder().empty_memory("
                    f"{len(memory[0])}), model)"
                )
            if field.held_in == "generation":
                kept[name] = tensor[..., :0, :]
            if axis is not None:
                kept[name] = self._cut_window(name, tensor, offset)
        return memory._replace(**kept)

    def _cut_window(self, name, tensor, offset):
        # The slots of a window's field that training carries.
        field, length = getattr(self.carried_fields, name), self.config.window_length
        unread = length - offset if offset and field.grows else 0
        size = field.between if offset == 0 else tensor.shape[field.window_axis] - unread
        first = min(size, self.window_axes[name][1]) if field.is_rebuilt else 0
        return tensor.narrow(field.window_axis, first, size - first)

    def windows_in_memory(self):
        """Kind of memory -> how many windows back it reaches, of the kinds that the layer has."""
        fields = [field for field in self.carried_fields if field.kind and field.per_window != 0]
        return {field.kind: field.num_windows() for field in fields}

    def forget(self, memory, windows):
        """Keep of each kind of memory what the newest so many windows left; zeros before it."""
        dropped = {
            name: zero_all_but_last(
                getattr(memory, name), windows[field.kind] * (field.per_window or 0)
            )
            for name, field in self.carried_items()
            if field.kind in windows
        }
        return memory._replace(**dropped)


def with_slots(shape, axis, size):
    """A shape with another size along one axis."""
    shape = list(shape)
    shape[axis] = size
    return tuple(shape)


def zero_all_but_last(tensor, slots):
    """Zeros in all but the last `slots` of ... M K."""
    dropped = tensor.shape[-2] - min(slots, tensor.shape[-2])
    return torch.cat((torch.zeros_like(tensor[..., :dropped, :]), tensor[..., dropped:, :]), dim=-2)
