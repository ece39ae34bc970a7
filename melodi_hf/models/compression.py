"""Compression of memories: n hidden states become n/c slots (Rae et al., 2020, section 3).

    max_pool, mean_pool   over c consecutive states, per channel
    conv                  a convolution along time whose kernel and stride are c
    dilated_conv          the same after residual dilated convolutions
    most_used             the n/c states that received most attention of the window, in time order

Losses of a learned compression:

    attention      the mean of |attn(h, old) - attn(h, compressed)|²    h: hidden states of the
                   window; attn: with the queries, keys and values of the layer, no positions
    autoencoding   the mean of |old - g(compressed)|²                   g is learned as well

The means are over all numbers of one window of one row. Only the compression and g are trained.
"""

import torch
from torch import nn
from torch.func import functional_call

from .configuration_compressive_transformer import DILATIONS
from .modules import attend, split_heads, unit


class MaxPooling(nn.Module):
    """The maximum of c numbers."""

    def __init__(self, config):
        super().__init__()
        self.rate = config.compression_rate

    def forward(self, old, attention_received):
        # old: B n D; attention_received: computes the attention to each state, B n -> B n/c D
        return old.unflatten(1, (-1, self.rate)).amax(2)


class MeanPooling(MaxPooling):
    """The mean of c numbers."""

    def forward(self, old, attention_received):
        return old.unflatten(1, (-1, self.rate)).mean(2)


class Convolution(MaxPooling):
    """A convolution whose kernel equals its stride: a matrix applied to c consecutive states."""

    def __init__(self, config):
        super().__init__(config)
        self.proj = nn.Linear(self.rate * config.hidden_size, config.hidden_size)

    def forward(self, old, attention_received):
        return self.proj(old.unflatten(1, (-1, self.rate)).flatten(2))


class DilatedConvolution(Convolution):
    """`Convolution` after dilated convolutions, each with a residual connection.

    The paper gives no sizes: kernels of 3, dilations of 1 and 2 and the residuals are ours.
    """

    def __init__(self, config):
        super().__init__(config)
        hidden = config.hidden_size
        self.dilated = nn.ModuleList(
            [nn.Conv1d(hidden, hidden, 3, dilation=d, padding=d) for d in DILATIONS]
        )

    def forward(self, old, attention_received):
        x = old.transpose(1, 2)
        for conv in self.dilated:
            x = x + conv(x).relu()
        return super().forward(x.transpose(1, 2), attention_received)


class MostUsed(MaxPooling):
    """The states that received most attention."""

    def forward(self, old, attention_received):
        chosen = attention_received().topk(old.shape[1] // self.rate, dim=1).indices
        chosen = chosen.sort(dim=1).values
        return old.gather(1, chosen[..., None].expand(-1, -1, old.shape[2]))


def make_compression(config):
    """Make the compression that the configuration names."""
    match config.compression:
        case "max_pool":
            return MaxPooling(config)
        case "mean_pool":
            return MeanPooling(config)
        case "conv":
            return Convolution(config)
        case "dilated_conv":
            return DilatedConvolution(config)
        case _:
            return MostUsed(config)


class AttentionReconstruction(nn.Module):
    """The difference of attention to the compressed and to the old states."""

    def forward(self, norm, attention, window, old, compressed):
        # window: B W D; old: B n D; compressed: B n/c D -> B
        eager = attention.config._attn_implementation == "eager"
        with torch.no_grad():
            q = attention.queries(norm(window))
            target = attend(q, *attention.keys_values(norm(old)), eager=eager)
        q, target = q.detach(), target.detach()  # removes tangents of forward mode, too
        normed = apply_frozen(norm, compressed)
        projections = attention.k_proj, attention.v_proj
        k, v = (split_heads(apply_frozen(p, normed), attention.num_heads) for p in projections)
        k = unit(k, attention.eps)
        return mean_square(attend(q, k, v, eager=eager) - target)


class Autoencoding(nn.Module):
    """The difference of the old states and a transposed convolution of the compressed ones."""

    def __init__(self, config):
        super().__init__()
        self.rate = config.compression_rate
        self.proj = nn.Linear(config.hidden_size, self.rate * config.hidden_size)

    def forward(self, norm, attention, window, old, compressed):
        restored = self.proj(compressed).unflatten(2, (self.rate, -1)).flatten(1, 2)
        return mean_square(restored - old)


def make_loss(config):
    """Make the loss that the configuration names, or return None."""
    match config.compression_loss:
        case "attention":
            return AttentionReconstruction()
        case "autoencoding":
            return Autoencoding(config)
        case _:
            return None


def apply_frozen(module, x):
    """Apply a module without gradients for its weights."""
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    return functional_call(module, weights, (x,))


def mean_square(x):
    """Compute the mean of the squares in each row: B ... -> B."""
    return x.float().square().flatten(1).mean(1)  # float32: a sum of many small numbers
