"""The building blocks of a layer: attention, positions, norms, feed-forward network.

    scores = (q · k + b[distance]) * |temperature|       q and k of length one, no 1/sqrt(K)
    out    = softmax(scores) v                           zero for a query that sees nothing

As in the released code, keys and queries are normalised per head, and a learned temperature per
head takes the place of 1/sqrt(K); it scales the position bias too. A token attends to what lies
strictly before it, never to itself.
"""

import math

import torch
from torch import nn
from transformers.activations import ACT2FN

from .kernels import attention_weights, is_traced, normalise, softmax_attention

# The score of a masked slot: its weight underflows to zero beside any other, and unlike the least
# float32 the number is finite in every format.
MASK_VALUE = -3e4


def split_heads(x, num_heads):
    """B T H*K -> B H T K."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x):
    """B H T K -> B T H*K."""
    return x.transpose(1, 2).flatten(2)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm (Zhang & Sennrich, 2019, eq. 4): g x / sqrt(mean(x²) + ε)."""

    def forward(self, x):
        x = x.to(self.weight.dtype)  # autocast passes bfloat16
        return normalise(x, self.weight, x.shape[-1], self.eps, self.compose)

    def compose(self, x, *_):
        """Compute the norm by torch's own kernel."""
        return super().forward(x)


def unit(x, eps, gain=None):
    """Scale vectors to length one, times `gain` (one number per vector); zero stays zero."""
    return normalise(x, gain, 1, eps)


def mean_rms(tokens):
    """Compute the root mean square of each row's numbers, averaged over rows: B ... -> scalar."""
    return tokens.float().flatten(1).square().mean(1).sqrt().mean()


class FeedForward(nn.Module):
    """Two matrices with an activation between."""

    def __init__(self, config):
        super().__init__()
        width, bias = config.intermediate_size, config.mlp_bias
        self.up_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.down_proj(self.activation(self.up_proj(x)))


def distance_bucket(distance, num_buckets, max_distance):
    """Find T5's bucket of each distance in tokens; negative distances fall into bucket 0.

    The first half of the buckets, E of N, holds one distance each; the second half grows
    logarithmically up to `max_distance`, and the last one holds everything beyond:

        bucket(n) = n                                               n < E
                    min(N - 1, E + floor(ln(n / E) / ln(max / E) * E))  otherwise
    """
    exact = num_buckets // 2
    distance = distance.clamp(min=0)
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * exact).long()).clamp(max=num_buckets - 1)
    return torch.where(distance < exact, distance, far)


def spread_by_distance(values, num_queries, num_keys):
    """Lay values given per distance out as a matrix of queries and keys.

    values: ... L with L = num_queries + num_keys - 1, from the furthest distance (the last query
    from the first key) down by one each. Returns ... num_queries num_keys, where
    `result[i, j] = values[num_queries - 1 - i + j]`. Reshapes alone, so that the gradient is a sum
    along diagonals without a scatter.
    """
    values = nn.functional.pad(values, (0, 1))  # never read: the table may be one column narrower
    length = values.shape[-1]
    rows = values.unsqueeze(-2).expand(*values.shape[:-1], num_queries, length)
    # In a table one column narrower each row begins one entry earlier than the row above it.
    first = num_queries - 1
    rolled = rows.flatten(-2)[..., first : first + num_queries * (length - 1)]
    return rolled.unflatten(-1, (num_queries, length - 1))[..., :num_keys]


class RelativePosition(nn.Module):
    """T5's causal relative position bias (Raffel et al., 2020, §2.1): one per head and bucket."""

    def __init__(self, config):
        super().__init__()
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.weight = nn.Parameter(torch.empty(config.num_attention_heads, self.num_buckets))

    def forward(self, distance):
        """distance: any shape, in tokens -> H, that shape."""
        return self.weight[:, distance_bucket(distance, self.num_buckets, self.max_distance)]


class Temperature(nn.Module):
    """A factor per head, greater than zero. A module of its own, so that code that keeps weights
    elsewhere (offloading to disk, ZeRO) loads them before they are read."""

    def __init__(self, num_heads):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads))

    def forward(self, dim):
        """H 1 1 ..., `dim` axes."""
        return self.weight.abs().view(-1, *[1] * (dim - 1))


def attend(q, k, v, bias=None, *, in_order=False, dropout=0.0, eager=False, return_weights=False):
    """Compute softmax attention.

    Args:
        q: B H T K, temperature applied; k, v: B H J K.
        bias: added to the scores, of a shape that broadcasts to B H T J, or None.
        in_order: the queries are the last T of the keys, and the bias masks what is not strictly
            before each; so masked keys may be skipped.
        dropout: the probability to drop a weight.
        eager: compose attention of separate operations, as `attn_implementation="eager"` asks.
        return_weights: the same, and return the weights that the result was computed with, too;
            a query that sees nothing gives zero in both.

    Returns:
        B H T K, or with `return_weights` that and the weights, B H T J.
    """
    if not (eager or return_weights):
        return softmax_attention(q, k, v, bias, in_order, dropout)
    weights = nn.functional.dropout(attention_weights(q, k, bias), dropout)
    if not return_weights:
        return weights @ v
    weights = zero_fully_masked(weights, bias)
    return weights @ v, weights


def zero_fully_masked(x, bias):
    """Set to zero the rows of x (B H T ...) whose query sees no slot."""
    return x if bias is None else x * (bias > MASK_VALUE / 2).any(-1, keepdim=True)


def mask_empty_slots(bias, num_slots, filled):
    """Mask the slots of the memory that a row has not filled yet.

    bias: ... J, the first `num_slots` of the J keys being the memory, oldest slot first, or None
    if there are no other keys; filled: how many slots are filled (B,), the newest ones, or which
    (B num_slots). Returns B H T J.
    """
    bias = torch.zeros(1, 1, num_slots, device=filled.device) if bias is None else bias
    if filled.dim() == 1:
        filled = torch.arange(num_slots, device=bias.device) >= num_slots - filled[:, None]
    empty = nn.functional.pad(~filled, (0, bias.shape[-1] - num_slots))
    return bias.masked_fill(empty[:, None, None], MASK_VALUE)


def merge_empty_slots(k, v, filled, are_masked):
    """Replace the slots that are empty in all rows by one.

    They are zeros, so all have the score 0, and n of them weigh as much as one of score log n.
    k, v: B H J K, oldest slot first -> keys, values and their bias, or None if it is 0 or the
    empty slots `are_masked` anyway.
    """
    merged, bias = max(0, count_empty_in_all_rows(k, filled) - 1), None
    if merged and not are_masked:
        bias = k.new_zeros(1, 1, 1, k.shape[2] - merged)
        bias[..., 0] = math.log(merged + 1)
    return k[:, :, merged:], v[:, :, merged:], bias


def count_empty_in_all_rows(k, filled):
    """Count the oldest slots that no row has filled; 0 where to know it would cost too much."""
    if k.device.type != "cpu" or is_traced():  # the device would have to wait
        return 0
    return k.shape[2] - int(filled.max())


class Attention(nn.Module):
    """Attention of one layer to [slots of a memory | window], with its projections.

    Args:
        config: of the model.
        num_slots: of the memory, before the window's tokens.
        always_sees: whether every query has something to attend to.
        token_slots: how many of them are the tokens just before the window.
        furthest: distance in tokens beyond which keys are masked, or None.
    """

    def __init__(self, config, num_slots=0, always_sees=True, token_slots=0, furthest=None):
        super().__init__()
        self.num_heads, self.eps = config.num_attention_heads, config.rms_norm_eps
        self.num_slots, self.token_slots, self.furthest = num_slots, token_slots, furthest
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.temperature = Temperature(config.num_attention_heads)
        self.position: nn.Module = RelativePosition(config)
        # A module although only its rate is used: TRL and others set the rate of such modules to 0.
        self.dropout = nn.Dropout(config.attention_dropout)
        self.config = config  # read in each call, as its `_attn_implementation` may be changed
        self.masks_empty = config.mask_empty_memory
        self.always_sees = always_sees and not config.mask_empty_memory

    def queries(self, x):
        """B T D, normalised -> B H T K, temperature applied."""
        return unit(split_heads(self.q_proj(x), self.num_heads), self.eps, self.temperature(3))

    def keys_values(self, x):
        """B J D, normalised -> two of B H J K; zeros give zeros."""
        k = unit(split_heads(self.k_proj(x), self.num_heads), self.eps)
        return k, split_heads(self.v_proj(x), self.num_heads)

    def bias_by_distance(self, distance):
        """Compute the bias of distances in tokens (any shape): -> H, that shape.

        Masked are distances that are not strictly before, and those beyond the furthest.
        """
        masked = distance <= 0
        if self.furthest is not None:
            masked = masked | (distance > self.furthest)
        bias = self.position(distance) * self.temperature(distance.dim() + 1)
        return bias.masked_fill(masked, MASK_VALUE)

    def position_bias(self, step, num_summaries=0):
        """Position bias of the queries of a `Step` towards [slots | window], H T J or R H T J; the
        slots are the tokens just before the window."""
        return step.bias(self.bias_by_distance, self.num_slots, num_summaries)

    def mask_empty(self, bias, num_slots, filled):
        """Apply `mask_empty_slots` if the configuration asks for it.

        Otherwise empty slots are zeros that are attended to, as in the released code.
        """
        return mask_empty_slots(bias, num_slots, filled) if self.masks_empty else bias

    def forward(self, q, k, v, filled, window):
        """Attend to [slots of the memory | window].

        Args:
            q: R H T K; k, v: R H J K.
            filled: how many of the slots are filled (R,), or which (R num_slots).
            window: a `Window`.

        Returns:
            R H T K, and the weights or None.
        """
        bias = self.mask_empty(window.bias, self.num_slots, filled)
        return self._attend(q, k, v, bias, window.in_order, window.return_weights)

    def attend_slots(self, q, k, v, filled):
        """Attend to a memory alone, whose slots have no positions: -> R H T K."""
        bias = None
        if q.shape[2] > 1:  # a single token costs the same all along a document
            k, v, bias = merge_empty_slots(k, v, filled, self.masks_empty)
        return self._attend(q, k, v, self.mask_empty(bias, k.shape[2], filled))[0]

    def _attend(self, q, k, v, bias, in_order=False, return_weights=False):
        dropout = self.dropout.p if self.training else 0.0
        if return_weights:
            return attend(q, k, v, bias, dropout=dropout, return_weights=True)
        eager = self.config._attn_implementation == "eager"
        attended = attend(q, k, v, bias, in_order=in_order, dropout=dropout, eager=eager)
        return attended if self.always_sees else zero_fully_masked(attended, bias), None
