"""What becomes of old memories: n hidden states turn into n/c slots (Rae et al., 2020, section 3).

    max_pool, mean_pool   over c states that follow one another, channel by channel
    conv                  a convolution along time whose kernel and stride are c
    dilated_conv          states first see their neighbours, through dilated convolutions
    most_used             the n/c states that the window paid most attention to, in time order

and what a learned compression is trained on:

    attention      the mean of |attn(h, old) - attn(h, compressed)|²    h: the window's hidden
                   states; attn with the layer's own queries, keys and values, by content alone
    autoencoding   the mean of |old - g(compressed)|²                   g is learned as well

The means are over all numbers of one window of one row. Neither loss trains anything else.
"""

import torch
from torch import nn
from torch.func import functional_call

from .attention import attend, split_heads
from .norm import unit

DILATIONS = (1, 2)


class MaxPooling(nn.Module):
    """The largest of c numbers."""

    def __init__(self, config):
        super().__init__()
        self.rate = config.compression_rate

    def forward(self, old, received):
        # old: B n D; received: what gives the attention that each received, B n -> B n/c D
        return old.unflatten(1, (-1, self.rate)).amax(2)


class MeanPooling(MaxPooling):
    """The mean of c numbers."""

    def forward(self, old, received):
        return old.unflatten(1, (-1, self.rate)).mean(2)


class Convolution(MaxPooling):
    """A convolution whose kernel is its stride: a matrix for c states that follow one another."""

    def __init__(self, config):
        super().__init__(config)
        self.proj = nn.Linear(self.rate * config.hidden_size, config.hidden_size)

    def forward(self, old, received):
        return self.proj(old.unflatten(1, (-1, self.rate)).flatten(2))


class DilatedConvolution(Convolution):
    """The same after dilated convolutions, each added to what it read. The paper names it and
    tells no more: kernels of 3, dilations of 1 and 2 and the residual are our reading."""

    def __init__(self, config):
        super().__init__(config)
        hidden = config.hidden_size
        self.dilated = nn.ModuleList(
            [nn.Conv1d(hidden, hidden, 3, dilation=d, padding=d) for d in DILATIONS]
        )

    def forward(self, old, received):
        x = old.transpose(1, 2)
        for conv in self.dilated:
            x = x + conv(x).relu()
        return super().forward(x.transpose(1, 2), received)


class MostUsed(MaxPooling):
    """The states that received most attention."""

    def forward(self, old, received):
        kept = received().topk(old.shape[1] // self.rate, dim=1).indices.sort(dim=1).values
        return old.gather(1, kept[..., None].expand(-1, -1, old.shape[2]))


def make_compression(config):
    """The compression that the configuration names."""
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
    """The window should find in the compressed states what it finds in the old ones."""

    def forward(self, norm, attention, window, old, compressed):
        # window: B W D; old: B n D; compressed: B n/c D -> B
        eager = attention.config._attn_implementation == "eager"
        with torch.no_grad():
            q = attention.queries(norm(window))
            wanted = attend(q, *attention.keys_values(norm(old)), eager=eager)
        q, wanted = q.detach(), wanted.detach()  # no tangents either
        normed = frozen(norm, compressed)
        k = unit(split_heads(frozen(attention.k_proj, normed), attention.num_heads), attention.eps)
        v = split_heads(frozen(attention.v_proj, normed), attention.num_heads)
        return mean_square(attend(q, k, v, eager=eager) - wanted)


class Autoencoding(nn.Module):
    """The old states should come back through a transposed convolution."""

    def __init__(self, config):
        super().__init__()
        self.rate = config.compression_rate
        self.proj = nn.Linear(config.hidden_size, self.rate * config.hidden_size)

    def forward(self, norm, attention, window, old, compressed):
        again = self.proj(compressed).unflatten(2, (self.rate, -1)).flatten(1, 2)
        return mean_square(again - old)


def make_loss(config):
    """The loss that the configuration names, None if there is none."""
    match config.compression_loss:
        case "attention":
            return AttentionReconstruction()
        case "autoencoding":
            return Autoencoding(config)
        case _:
            return None


def frozen(module, x):
    """What a module makes of x, without a gradient for its weights."""
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    return functional_call(module, weights, (x,))


def mean_square(x):
    """The mean of the squares in each row. B ... -> B."""
    return x.float().square().flatten(1).mean(1)  # float32: a sum of many small numbers
