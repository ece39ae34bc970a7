"""Training on TPUs with torch_xla: one compiled graph, whatever the number of windows.

torch_xla traces and compiles Python code, so a Python loop is unrolled in the graph. Here the
windows of a segment are read by one XLA loop (scan):

    unrolled   [ window 0 | window 1 | window 2 | ... ]      the graph grows with the segment
    loop       [ window k ] <- memory                        the graph contains one window

For backward only the memory before each window is stored. Windows are recomputed from the last to
the first, with the same random numbers for dropout.

`XLA_USE_SPMD=1` shards rows and weights over all devices (FSDP by SPMD); without it one device is
used.
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

from melodi_hf.models.memory_file import unwrap_decoder
from melodi_hf.models.validation import require
from melodi_hf.models.windows import Plan, Progress, Step, StepOutput, plan_windows
from melodi_hf.trainer import MemoryTrainer

DEVICE = "xla"


class LoopPlan(Plan):
    """Plan of a training call of complete windows: one step, which an XLA loop repeats.

    Args:
        progress: before the call; all rows are at the beginning of a window.
    """

    def __init__(self, progress, num_columns, window_length):
        self.num_windows = num_columns // window_length
        after = Progress(progress.tokens_read + num_columns, 0, progress.forgotten)
        super().__init__([whole_window(window_length, progress.tokens_read)], after, num_columns)

    @property
    def num_closing(self):
        return self.num_windows * self.steps[0].num_rows

    def run(self, read, position_bias, memory, x, summaries):
        """Read all windows with one layer; returns one `StepOutput`, of the whole call.

        x: B T D; summaries: N U D, window by window.
        """
        require(
            not self.return_weights,
            "output_attentions=True is not supported by a loop over windows: run on a CPU, or with "
            "unrolled windows",
        )
        require(
            self.rebuilds_context and not self.records,
            "a cache (past_key_values) is not supported by a loop over windows: pass memory and "
            "return_memory=True, or read under torch.no_grad()",
        )
        (step,), module = self.steps, MethodModule(read)
        carried = {name: tensor for name, tensor in memory._asdict().items() if tensor.numel()}
        forgotten, weights = step.forgotten, dict(module.named_parameters())

        def read_window(state, shared, tokens_read, x, summaries):
            bias, *shared = shared
            counts, tensors = split_lists(shared, len(forgotten))
            memory_before = memory._replace(**dict(zip(carried, state, strict=True)))
            each = whole_window(step.window_length, tokens_read)
            each.forgotten = dict(zip(forgotten, counts, strict=True))
            given = each, each.window(bias, self), memory_before, x, summaries
            output, new = functional_call(module, dict(zip(weights, tensors, strict=True)), given)
            check_shapes(memory_before, new)
            losses = [] if output.loss is None else [output.loss]
            return [getattr(new, name) for name in carried], [output.x, output.summaries, *losses]

        before = torch.arange(self.num_windows, device=x.device)[:, None] * step.window_length
        shared = position_bias(step), *forgotten.values(), *weights.values()
        tensors = Loop.apply(
            read_window,
            (len(carried), len(shared)),
            *carried.values(),
            *shared,
            step.tokens_read + before,  # C B
            x.unflatten(1, (self.num_windows, -1)).transpose(0, 1),  # C B W D
            summaries.unflatten(0, (self.num_windows, -1)),  # C B U D
        )
        state, (x, summaries, *losses) = split_lists(tensors, len(carried))
        loss = losses[0].sum() if losses else None
        x, summaries = x.transpose(0, 1).flatten(1, 2), summaries.flatten(0, 1)
        output = StepOutput(x, summaries, loss, None, None)
        return [output], memory._replace(**dict(zip(carried, state, strict=True)))


def whole_window(window_length, tokens_read):
    """Make the step of a complete window."""
    return Step(window_length, window_length, 0, tokens_read)


def check_shapes(before, after):
    """Raise `ValueError` for a memory whose shape changes, which a scan must keep."""
    shapes = [[getattr(part, "shape", None) for part in memory] for memory in (before, after)]
    require(
        shapes[0] == shapes[1],
        "this system has a memory of single tokens, which a loop over windows does not support: "
        "train it on a GPU or CPU",
    )


class MethodModule(nn.Module):
    """A method of a layer as a module, so that functional_call can pass its weights."""

    def __init__(self, method):
        super().__init__()
        self.layer, self.method = method.__self__, method

    def forward(self, *args):
        return self.method(*args)


class Loop(torch.autograd.Function):
    """Scan `read(state, shared, *part) -> state, outputs` over the leading axis of the parts.

    Takes `read`, the numbers of state and shared tensors, then these tensors and the parts. Returns
    the last state and the outputs, each stacked along a new first axis.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type=DEVICE)
    def forward(ctx, read, counts, *tensors):
        state, shared, parts = split_lists(tensors, *counts)
        ctx.read, ctx.counts, ctx.random_state = read, counts, xm.get_rng_state()
        # The loop uses the last random state that was set; set it, so that backward can restore it.
        xm.set_rng_state(ctx.random_state)

        def step(carry, parts):
            state, shared = split_lists(carry, counts[0])
            new, outputs = read(state, shared, *parts)
            return [*cast_like(new, state), *shared], [*state, *outputs]

        carry, stacked = _scan_impl_flat(step, [*state, *shared], parts)
        states, outputs = split_lists(stacked, counts[0])
        ctx.save_for_backward(*states, *shared, *parts)
        return *carry[: counts[0]], *outputs

    @staticmethod
    @torch.amp.custom_bwd(device_type=DEVICE)
    def backward(ctx, *grads):
        read, (num_state, num_shared) = ctx.read, ctx.counts
        states, shared, parts = split_lists(ctx.saved_tensors, num_state, num_shared)
        grad_state, grad_outputs = split_lists(grads, num_state)

        def step(carry, given):
            grad_state, grad_shared, shared = split_lists(carry, num_state, num_shared)
            grad_outputs_k, state, parts = split_lists(given, len(grad_outputs), num_state)
            with torch.enable_grad():
                inputs = [detach_leaf(tensor) for tensor in (*state, *shared, *parts)]
                state, new_shared, parts = split_lists(inputs, num_state, num_shared)
                new, outputs = read(state, new_shared, *parts)
                outputs = [*cast_like(new, state), *outputs]
            found = compute_gradients(outputs, inputs, [*grad_state, *grad_outputs_k])
            grad_state, more, grad_parts = split_lists(found, num_state, num_shared)
            summed = [a + b for a, b in zip(grad_shared, more, strict=True)]
            return [*grad_state, *summed, *shared], grad_parts

        carry = [*grad_state, *map(torch.zeros_like, shared), *shared]
        now = xm.get_rng_state()
        xm.set_rng_state(ctx.random_state)
        given = [*grad_outputs, *states, *parts]
        carry, grad_parts = _scan_impl_flat(step, carry, given, reverse=True)
        xm.set_rng_state(now)
        return None, None, *carry[: num_state + num_shared], *grad_parts


def split_lists(tensors, *counts):
    """Split into lists of `counts[0]`, `counts[1]`, ... tensors, and the rest."""
    pieces, tensors = [], list(tensors)
    for count in counts:
        pieces.append(tensors[:count])
        tensors = tensors[count:]
    return *pieces, tensors


def cast_like(new, old):
    """Cast to the dtypes of `old`, which a scan must keep."""
    return [tensor.to(before.dtype) for tensor, before in zip(new, old, strict=True)]


def detach_leaf(tensor):
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def compute_gradients(outputs, inputs, grads):
    """Return a gradient for each input, zeros if the outputs do not depend on it."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    grads = [next(found) if tensor.requires_grad else None for tensor in inputs]
    pairs = zip(grads, inputs, strict=True)
    return [torch.zeros_like(tensor) if grad is None else grad for grad, tensor in pairs]


def plan_loop(progress, num_columns, mask, window_length, in_place=False):
    """Make a plan, with a loop if all rows read complete windows and no cache is filled."""
    is_whole = mask is None and progress.offset == 0 and num_columns % window_length == 0
    if is_whole and not in_place and progress.tokens_read.device.type == DEVICE:
        return LoopPlan(progress, num_columns, window_length)
    return plan_windows(progress, num_columns, mask, window_length, in_place)


def devices_per_process():
    """Return the number of devices over which one process shards its rows."""
    return xr.global_runtime_device_count() if xr.is_spmd() else 1


def training_arguments() -> dict[str, Any]:
    """Return the `TrainingArguments` that a TPU needs."""
    # The Trainer's default, fused AdamW, has no XLA kernel.
    given: dict[str, Any] = {"optim": "adamw_torch"}
    if xr.is_spmd():
        given |= {"fsdp": True, "fsdp_config": {"xla": True, "xla_fsdp_v2": True}}
    return given


class TpuTrainer(MemoryTrainer):
    """A `MemoryTrainer` for TPUs; after training the model is on the CPU."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        names = ("activation_checkpointing", "gradient_checkpointing")  # since 5.23, and before
        if any(getattr(self.args, name, False) for name in names):
            raise ValueError(
                "gradient_checkpointing=True is not supported on a TPU, where backward recomputes "
                "every window anyway: pass gradient_checkpointing=False"
            )
        self.skip_logits = False  # the compiler decides what is stored

    def train(self, *args, **kwargs):
        model: Any = self.model
        decoder = unwrap_decoder(model)
        decoder.plan_windows = plan_loop
        before = model.register_forward_pre_hook(add_empty_memory, with_kwargs=True)
        after = model.register_forward_hook(shard_memory)
        output = super().train(*args, **kwargs)
        before.remove()
        after.remove()
        del decoder.plan_windows
        unwrap_fsdp(self.model)
        self.model = self.model_wrapped = model.to("cpu")
        model.tie_weights()  # moving the model unties weights
        return output

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if isinstance(optimizer, Adafactor):
            optimizer._get_lr = learning_rate_without_sync  # type: ignore[method-assign]
        return optimizer

    def save_model(self, *args, **kwargs):
        wrapped = self.model
        self.model, places = unwrap_fsdp(wrapped)
        super().save_model(*args, **kwargs)
        self.model = wrapped
        for parent, name, wrapper in places:
            setattr(parent, name, wrapper)

    def whole_model(self):
        return self.model if self.is_world_process_zero() else None

    def _wrap_model(self, model, *args, **kwargs):
        """Create the optimizer that transformers 5.23.0 does not create with XLA FSDP.

        trainer.py postpones it (line 1717) and creates it only for models that accelerate wraps
        (lines 1737 to 1753). Without this method training fails with "'NoneType' object has no
        attribute 'param_groups'". The branch was added by pull request 39152.
        """
        if not self.is_fsdp_xla_enabled:
            return super()._wrap_model(model, *args, **kwargs)
        self._move_model_to_device(model, self.args.device)  # ties weights, which wrapping does not
        wrapped = super()._wrap_model(model, *args, **kwargs)
        if self.optimizer is None:
            self.create_optimizer(wrapped)
        return wrapped


def learning_rate_without_sync(group, state):
    """Compute Adafactor's learning rate on the device.

    transformers compares the weights' RMS with `eps` in Python, a synchronization per weight and
    step.
    """
    assert not group["relative_step"]
    if not group["scale_parameter"]:
        return group["lr"]
    return state["RMS"].clamp(min=group["eps"][1]) * group["lr"]


def add_empty_memory(model, args, kwargs):
    """Pass an empty memory in the first step, as data, so that all steps have the same graph."""
    if not kwargs.get("return_memory"):
        return None
    if kwargs.get("memory") is None:
        empty = unwrap_decoder(model).empty_memory(len(kwargs["input_ids"]), device="cpu")
        kwargs["memory"] = tree_map(to_device, empty)
    shard_rows(kwargs["memory"])
    return args, kwargs


def to_device(leaf):
    return leaf.to(DEVICE) if torch.is_tensor(leaf) else leaf


def shard_memory(model, args, output):
    shard_rows(output.memory)


def shard_rows(memory):
    """Shard the rows of a memory over the devices."""
    if not xr.is_spmd():
        return
    for tensor in filter(torch.is_tensor, tree_leaves(memory)):
        if tensor.numel() and not torch_xla._XLAC._get_xla_sharding_spec(tensor):
            rest = (None,) * (tensor.dim() - 1)
            xs.mark_sharding(tensor, xs.get_global_mesh(), ("fsdp", *rest))


def unwrap_fsdp(model):
    """Remove FSDP wrappers; return the model and the wrappers as (parent, name, wrapper)."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, SpmdFullyShardedDataParallel)
    ]
    for parent, name, wrapper in places:
        setattr(parent, name, wrapper.module)
    return getattr(model, "module", model), places
