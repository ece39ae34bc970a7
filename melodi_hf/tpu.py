"""Training on TPUs, by torch_xla: one compiled graph for all steps, whatever the number of windows.

torch_xla records what Python does and compiles what it has recorded, so a loop in Python is
compiled as often as it turns. Here the windows of a segment are read by one loop of XLA's:

    unrolled   [ window 0 | window 1 | window 2 | ... ]      a graph that grows with the segment
    loop       [ window k ] <- its state                      one window, whatever their number

Nothing of a window is kept for backward but what it found in memory: each is computed once more,
from the last to the first, as the gradients come through. So dropout must draw the same numbers
again, and does.

`XLA_USE_SPMD=1` cuts rows and weights over all devices (FSDP by way of SPMD); without it there is
one device.
"""

from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map
from torch_xla.experimental.scan import _scan_impl_flat
from torch_xla.experimental.spmd_fully_sharded_data_parallel import SpmdFullyShardedDataParallel
from transformers import Adafactor

from melodi_hf.models.adapters import unwrap_decoder
from melodi_hf.models.ragged import make_plan
from melodi_hf.models.windows import Chunk, Plan, Progress
from melodi_hf.trainer import MemoryTrainer

DEVICE = "xla"


class Cell(nn.Module):
    """A method of a layer as a module of its own, whose weights can then be given from outside."""

    def __init__(self, method):
        super().__init__()
        self.layer = method.__self__
        self.method = method

    def weights(self):
        return dict(self.named_parameters())

    def forward(self, *given):
        return self.method(*given)


class Windows(Chunk):
    """All windows of a call in place of one: W tokens each, all of them whole.

    tokens_read: of each row before the first window (B,).
    """

    def __init__(self, count, tokens_read, window_length):
        super().__init__(window_length, 0, tokens_read, window_length)
        self.count = count

    def run(self, cell, changed, bias, memory, *parts):
        """As for one window; each of the parts, and the output, has the windows in front."""
        module, shapes, bias = Cell(cell), {}, bias(self)
        names, weights = zip(*module.weights().items(), strict=True)

        def read(state, shared, tokens_read, *parts):
            bias, *weights = shared
            held = memory._replace(**dict(zip(changed, state, strict=True)))
            chunk = Chunk(self.tokens, 0, tokens_read, self.window_length)
            given = (chunk, bias, held, *parts)
            output, new = functional_call(module, dict(zip(names, weights, strict=True)), given)
            shapes.update({name: part.shape for name, part in new._asdict().items()})
            return [getattr(new, name) for name in changed], output

        state = [getattr(memory, name) for name in changed]
        window = torch.arange(self.count, device=bias.device)[:, None] * self.tokens
        *state, output = Loop.apply(
            read,
            (len(state), 1 + len(weights)),
            *state,
            bias,
            *weights,
            self.tokens_read + window,
            *parts,
        )
        # What else a memory has belongs to the open window, of which there is none.
        rest = {name: getattr(memory, name) for name in memory._fields if name not in changed}
        rest = {name: tensor.new_empty(shapes[name]) for name, tensor in rest.items()}
        return output, memory._replace(**dict(zip(changed, state, strict=True)), **rest)


class Loop(torch.autograd.Function):
    """`read(state, shared, *part) -> state, output`, over the leading axis of the parts.

    Takes `read`, how many tensors are state and how many are shared, then these and the parts;
    returns the last state and the outputs, one behind the other along a new first axis.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type=DEVICE)
    def forward(ctx, read, counts, *tensors):
        state, shared, parts = cut(tensors, *counts)
        ctx.read, ctx.counts, ctx.random_state = read, counts, xm.get_rng_state()
        # A loop draws from the last state that was set, backward from this one: so it must be it.
        xm.set_rng_state(ctx.random_state)

        def turn(carry, parts):
            state, shared = cut(carry, counts[0])
            new, output = read(state, shared, *parts)
            return [*alike(new, state), *shared], [output, *state]

        carry, (output, *states) = _scan_impl_flat(turn, [*state, *shared], parts)
        ctx.save_for_backward(*states, *shared, *parts)
        return *carry[: counts[0]], output

    @staticmethod
    @torch.amp.custom_bwd(device_type=DEVICE)
    def backward(ctx, *grads):
        read, (num_state, num_shared) = ctx.read, ctx.counts
        states, shared, parts = cut(ctx.saved_tensors, num_state, num_shared)

        def turn(carry, given):
            grad_state, grad_shared, shared = cut(carry, num_state, num_shared)
            grad_output, *held = given
            state, parts = cut(held, num_state)
            with torch.enable_grad():
                inputs = [leaf(tensor) for tensor in (*state, *shared, *parts)]
                state, new_shared, parts = cut(inputs, num_state, num_shared)
                new, output = read(state, new_shared, *parts)
                outputs, grads = [*alike(new, state), output], [*grad_state, grad_output]
            found = gradients(outputs, inputs, grads)
            grad_state, more, grad_parts = cut(found, num_state, num_shared)
            summed = [a + b for a, b in zip(grad_shared, more, strict=True)]
            return [*grad_state, *summed, *shared], grad_parts

        carry = [*grads[:-1], *map(torch.zeros_like, shared), *shared]
        now = xm.get_rng_state()
        xm.set_rng_state(ctx.random_state)
        carry, grad_parts = _scan_impl_flat(turn, carry, [grads[-1], *states, *parts], reverse=True)
        xm.set_rng_state(now)
        return None, None, *carry[: num_state + num_shared], *grad_parts


def cut(tensors, *counts):
    """The first `counts[0]`, the `counts[1]` behind them, and so on, and the rest; lists."""
    pieces, tensors = [], list(tensors)
    for count in counts:
        pieces.append(tensors[:count])
        tensors = tensors[count:]
    return *pieces, tensors


def alike(new, old):
    """A loop carries tensors of one dtype from turn to turn."""
    return [tensor.to(before.dtype) for tensor, before in zip(new, old, strict=True)]


def leaf(tensor):
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def gradients(outputs, inputs, grads):
    """One for each input, zeros where nothing depends on it."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    grads = [next(found) if tensor.requires_grad else None for tensor in inputs]
    pairs = zip(grads, inputs, strict=True)
    return [torch.zeros_like(tensor) if grad is None else grad for grad, tensor in pairs]


class LoopPlan(Plan):
    """A call of whole windows, all rows at the beginning of one: there is one chunk, `Windows`."""

    def __init__(self, progress, num_columns, window_length):
        self.num_columns, self.count = num_columns, num_columns // window_length
        self.chunks = [Windows(self.count, progress.tokens_read, window_length)]
        self.progress = Progress(progress.tokens_read + num_columns, 0)
        self.lanes = progress.tokens_read.shape[0]

    @property
    def num_closing(self):
        return self.count

    def record(self):
        raise ValueError("a loop over windows keeps no way back: decode without an assistant")

    def keep_weights(self):
        raise ValueError(
            "output_attentions is not to be had from a loop over windows: "
            "ask for it on the CPU, or with the windows unrolled"
        )

    def line_up(self, packed, dim):
        raise ValueError(
            "a memory of single tokens has no loop over windows: train this system on a GPU or "
            "the CPU"
        )

    def pack(self, x, summaries):
        tokens = x.unflatten(1, (self.count, -1))  # B C W D
        return torch.cat((tokens, summaries), dim=2).flatten(1, 2)

    def unpack(self, pieces, num_summary_tokens):
        whole = pieces[0].transpose(0, 1)  # B C W+U D
        tokens = whole.shape[2] - num_summary_tokens
        x, summaries = whole.split((tokens, num_summary_tokens), dim=2)
        return x.flatten(1, 2), summaries

    def split(self, packed, dim, num_summary_tokens=0):
        return [packed.unflatten(dim, (self.count, -1)).movedim(dim, 0)]

    def join(self, pieces, dim):
        return pieces[0].movedim(0, dim).flatten(dim, dim + 1)


def make_loop_plan(progress, num_columns, mask, window_length, in_place=False):
    """As `make_plan`, with a loop where the windows are equal."""
    is_equal = mask is None and progress.fill == 0 and num_columns % window_length == 0
    if is_equal and progress.tokens_read.device.type == DEVICE:
        return LoopPlan(progress, num_columns, window_length)
    return make_plan(progress, num_columns, mask, window_length, in_place)


def devices_per_process():
    """Over how many devices one process deals its rows."""
    return xr.global_runtime_device_count() if xr.is_spmd() else 1


def arguments() -> dict[str, Any]:
    """What `TrainingArguments` must say on a TPU."""
    # The Trainer's usual AdamW, fused into one kernel, has none for it.
    given: dict[str, Any] = {"optim": "adamw_torch"}
    if xr.is_spmd():
        given |= {"fsdp": True, "fsdp_config": {"xla": True, "xla_fsdp_v2": True}}
    return given


class TpuTrainer(MemoryTrainer):
    """A `MemoryTrainer` whose steps are one graph; afterwards the model is on the host again."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        names = ("activation_checkpointing", "gradient_checkpointing")  # since 5.23, and before
        if any(getattr(self.args, name, False) for name in names):
            raise ValueError(
                "gradient_checkpointing is True: on a TPU every window is computed once more in "
                "backward as it is; give gradient_checkpointing=False"
            )
        self.skip_logits = False  # its compiler decides what is kept

    def train(self, *args, **kwargs):
        model: Any = self.model
        decoder = unwrap_decoder(model)
        decoder.make_plan = make_loop_plan
        before = model.register_forward_pre_hook(give_memory, with_kwargs=True)
        after = model.register_forward_hook(shard_memory)
        output = super().train(*args, **kwargs)
        before.remove()
        after.remove()
        del decoder.make_plan
        take_off_wrappers(self.model)
        self.model = self.model_wrapped = model.to("cpu")
        model.tie_weights()  # moving tears them apart
        return output

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if isinstance(optimizer, Adafactor):
            optimizer._get_lr = unread_learning_rate  # type: ignore[method-assign]
        return optimizer

    def save_model(self, *args, **kwargs):
        wrapped = self.model
        self.model, places = take_off_wrappers(wrapped)
        super().save_model(*args, **kwargs)
        self.model = wrapped
        for parent, name, wrapper in places:
            setattr(parent, name, wrapper)

    def whole_model(self):
        return self.model if self.is_world_process_zero() else None

    def _wrap_model(self, model, *args, **kwargs):
        """Works around transformers 5.23.0: with FSDP of XLA's, trainer.py leaves the optimizer for
        later (line 1717), and does so later only for models that accelerate wraps (lines 1737 to
        1753), which this one is not: it fails with "'NoneType' object has no attribute
        'param_groups'". No issue is known; the branch came with pull request 39152."""
        if not self.is_fsdp_xla_enabled:
            return super()._wrap_model(model, *args, **kwargs)
        self._move_model_to_device(model, self.args.device)  # which ties weights, wrapping does not
        wrapped = super()._wrap_model(model, *args, **kwargs)
        if self.optimizer is None:
            self.create_optimizer(wrapped)
        return wrapped


def unread_learning_rate(group, state):
    """Adafactor's, relative to the weights. transformers compares their size with the least one in
    Python, which has to wait for it: once for each weight and step."""
    assert not group["relative_step"]
    if not group["scale_parameter"]:
        return group["lr"]
    return state["RMS"].clamp(min=group["eps"][1]) * group["lr"]


def give_memory(model, args, kwargs):
    """An empty memory where there is none: data, as those of later steps are, not zeros that would
    be part of the graph."""
    if not kwargs.get("return_memory"):
        return None
    if kwargs.get("memory") is None:
        empty = unwrap_decoder(model).empty_memory(len(kwargs["input_ids"]), device="cpu")
        kwargs["memory"] = tree_map(on_device, empty)
    shard_rows(kwargs["memory"])
    return args, kwargs


def on_device(leaf):
    return leaf.to(DEVICE) if torch.is_tensor(leaf) else leaf


def shard_memory(model, args, output):
    shard_rows(output.memory)


def shard_rows(memory):
    """Cut the rows of a memory over the devices, if there are several."""
    if not xr.is_spmd():
        return
    for tensor in filter(torch.is_tensor, tree_leaves(memory)):
        if tensor.numel() and not torch_xla._XLAC._get_xla_sharding_spec(tensor):
            rest = (None,) * (tensor.dim() - 1)
            xs.mark_sharding(tensor, xs.get_global_mesh(), ("fsdp", *rest))


def take_off_wrappers(model):
    """The model as it was before FSDP, and where its wrappers were: (parent, name, wrapper)."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, SpmdFullyShardedDataParallel)
    ]
    for parent, name, wrapper in places:
        setattr(parent, name, wrapper.module)
    return getattr(model, "module", model), places
