"""Root-mean-square norm (Zhang & Sennrich, 2019, eq. 4) and vectors of length one.

    rms_norm(x) = g x / sqrt(mean(x²) + ε)          unit(x) = x / sqrt(sum(x²) + ε)

On the CPU torch composes them from several passes and keeps what each of them made; here backward
needs the input and one number per vector. Elsewhere torch's own kernels are used.
"""

from functools import partial

import torch
from torch import nn

from .tracing import composed_gradient, is_traced, needs_composed_gradient


class Normalise(torch.autograd.Function):
    """gain x / sqrt(sum(x²) / divisor + ε) over the last axis; float32 or wider.

    gain: numbers in a shape that broadcasts to x, be it one per channel or one per vector; or None.
    """

    @staticmethod
    def forward(ctx, x, gain, divisor, eps):
        scale = _scale(x, divisor, eps)
        ctx.save_for_backward(x, gain, scale)
        ctx.divisor, ctx.eps = divisor, eps
        return _scaled(x, gain, scale)

    @staticmethod
    def backward(ctx, grad):
        # With s the scale, the gradient is  s g - x s³ (g·x) / divisor,  where g = gain * grad.
        x, gain, scale = ctx.saved_tensors
        if needs_composed_gradient(grad):
            compose = partial(_composed, divisor=ctx.divisor, eps=ctx.eps)
            return *composed_gradient(compose, (x, gain), grad), None, None
        grad_gain = None
        if gain is None:
            along, out = torch.linalg.vecdot(grad, x).unsqueeze_(-1), grad * scale
        elif gain.shape[-1] == 1:
            along = torch.linalg.vecdot(grad, x).unsqueeze_(-1)
            grad_gain = (along * scale).sum_to_size(gain.shape)
            along, out = along * gain, grad * (scale * gain)
        elif gain.dim() == 1:
            products = grad * x
            grad_gain = scale.flatten() @ products.flatten(0, -2)
            along, out = (products @ gain).unsqueeze_(-1), (grad * gain).mul_(scale)
        else:
            scaled = grad * gain
            grad_gain = (grad * x).mul_(scale).sum_to_size(gain.shape)
            along, out = torch.linalg.vecdot(scaled, x).unsqueeze_(-1), scaled.mul_(scale)
        along.mul_(scale).mul_(scale).mul_(scale).div_(ctx.divisor)
        return out.addcmul_(x, along, value=-1), grad_gain, None, None


def _scale(x, divisor, eps):
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return squares.div_(divisor).add_(eps).rsqrt_()


def _scaled(x, gain, scale):
    if gain is None:
        return x * scale
    return x * (scale * gain) if gain.shape[-1] == 1 else (x * scale).mul_(gain)


def _composed(x, gain, divisor, eps):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # a sum of many small numbers
    scale = torch.rsqrt(wide.square().sum(-1, keepdim=True) / divisor + eps)
    return x * (scale if gain is None else scale * gain).to(x.dtype)


def normalise(x, gain, divisor, eps):
    """`Normalise`, without its cost where nobody differentiates."""
    if torch.is_grad_enabled():
        return Normalise.apply(x, gain, divisor, eps)
    return _scaled(x, gain, _scale(x, divisor, eps))


def composed_by_torch(x):
    """Whether torch has no kernel of its own for these."""
    if is_traced():  # then a compiler composes
        return False
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


class RMSNorm(nn.RMSNorm):
    """torch's, with a lean backward on the CPU."""

    def forward(self, x):
        x = x.to(self.weight.dtype)  # autocast hands over bfloat16
        if composed_by_torch(x):
            return normalise(x, self.weight, x.shape[-1], self.eps)
        return super().forward(x)


def unit(x, eps, gain=None):
    """Vectors of length one along the last axis, times `gain` (numbers per vector) if there is
    one; a zero vector stays zero."""
    if composed_by_torch(x):
        return normalise(x, gain, 1, eps)
    return _composed(x, gain, 1, eps)


def mean_size(tokens):
    """The root mean square of each row's numbers, averaged over rows. B ... -> a number."""
    return tokens.float().flatten(1).square().mean(1).sqrt().mean()
