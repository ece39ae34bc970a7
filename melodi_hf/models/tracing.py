"""Where Python may not read values, and gradients of gradients.

Kernels whose gradient is written by hand (attention, norms, losses, retrieval) know first
derivatives of one batch. Under `torch.func` and forward-mode differentiation the same is composed
of torch's operations instead, which support every transform; so is it in backward where gradients
will be differentiated again.
"""

import torch
from torch.autograd import forward_ad


def is_traced():
    """Tell whether a call is captured in a graph or transformed (torch.func, forward-mode).

    Then Python may not branch on values, and kernels give way to operations of torch.
    """
    return torch.compiler.is_compiling() or is_transformed()


def is_transformed():
    """Tell whether a call runs eagerly under `torch.func` or forward-mode differentiation."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needs_composed_gradient(*grads):
    """Tell whether a backward that is given `grads` must be composed of torch's operations.

    It must where its result will be differentiated (`create_graph=True`), under `torch.func`, and
    where many gradients come at once (`is_grads_batched=True`).
    """
    if torch.is_grad_enabled() or is_traced():
        return True
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)


def composed_gradient(function, inputs, grads):
    """Compute the gradients of `function(*inputs)` by automatic differentiation.

    Args:
        function: composed of torch's operations; returns a tensor or a tuple of tensors.
        inputs: what backward saved: tensors, or None.
        grads: the gradient of each output.

    Returns:
        One gradient per input, None for those that require none. They can be differentiated again
        if gradients are enabled.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that no input is part of the graph of another one.
        given = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
        outputs = function(*given)
    wanted = [x for x in given if x is not None and x.requires_grad]
    found = iter(
        torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph, allow_unused=True)
    )
    return tuple(next(found) if x is not None and x.requires_grad else None for x in given)
