"""Root-mean-square norm (Zhang & Sennrich, 2019, eq. 4) and vectors of length one.

    rms_norm(x) = g x / sqrt(mean(x²) + ε)          unit(x) = x / sqrt(sum(x²) + ε)

On the CPU torch composes them from several passes and keeps what each of them made; here backward
needs the input and one number per vector. Elsewhere torch's own kernels are used.
"""

import torch
from torch import nn


class Normalise(torch.autograd.Function):
    """x / sqrt(sum(x²) / divisor + ε) over the last axis; float32 or wider."""

    @staticmethod
    def forward(ctx, x, gain, divisor, eps):
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = squares.div_(divisor).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, scale)
        ctx.divisor = divisor
        y = x * scale
        return y if gain is None else y.mul_(gain)

    @staticmethod
    def backward(ctx, grad):
        x, gain, scale = ctx.saved_tensors
        grad_gain = None
        y = x * scale
        if gain is not None:
            grad_gain = (grad * y).flatten(0, -2).sum(0)
            grad = grad * gain
        along = torch.linalg.vecdot(grad, y).unsqueeze_(-1).div_(ctx.divisor)
        return y.mul_(along).neg_().add_(grad).mul_(scale), grad_gain, None, None


def _composed_by_torch(x):
    if torch.compiler.is_compiling():  # then a compiler composes
        return False
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


class RMSNorm(nn.RMSNorm):
    """torch's, with a lean backward on the CPU."""

    def forward(self, x):
        x = x.to(self.weight.dtype)  # autocast hands over bfloat16
        if _composed_by_torch(x):
            return Normalise.apply(x, self.weight, x.shape[-1], self.eps)
        return super().forward(x)


def unit(x, eps):
    """Vectors of length one along the last axis; a zero vector stays zero."""
    if _composed_by_torch(x):
        return Normalise.apply(x, None, 1, eps)
    squares = x.float().pow(2).sum(-1, keepdim=True)  # float32: a sum of many small numbers
    return x * torch.rsqrt(squares + eps).to(x.dtype)


def mean_size(tokens):
    """The root mean square of each row's numbers, averaged over rows. B ... -> a number."""
    return tokens.float().flatten(1).square().mean(1).sqrt().mean()
