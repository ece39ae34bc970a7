"""T5's relative position bias in its causal form (Raffel et al., 2020, §2.1).

One learned number per head and bucket of distances is added to each attention score. The first
half of the buckets holds one distance each, the second half grows logarithmically up to a maximal
distance; all distances beyond share the last bucket:

    bucket(n) = n                                               n < E
                min(N - 1, E + floor(ln(n / E) / ln(max / E) * E))  otherwise,  E = N / 2
"""

import math

import torch
from torch import nn


def distance_bucket(distance, num_buckets, max_distance):
    """The bucket of each distance in tokens (integers); negative ones fall into bucket 0."""
    exact = num_buckets // 2
    distance = distance.clamp(min=0)
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * exact).long()).clamp(max=num_buckets - 1)
    return torch.where(distance < exact, distance, far)


def spread_by_distance(values, num_queries, num_keys):
    """Lay values given per distance out as a matrix of queries and keys.

    values: ... L with L = num_queries + num_keys - 1, from the furthest distance (the last query
    from the first key) down by one each. Returns ... num_queries num_keys, where
    `result[i, j] = values[num_queries - 1 - i + j]`.

    Written with reshapes alone, so that its gradient is a sum along diagonals without a scatter.
    """
    values = nn.functional.pad(values, (0, 1))  # never read: the table may be one column narrower
    length = values.shape[-1]
    rows = values.unsqueeze(-2).expand(*values.shape[:-1], num_queries, length)
    # In a table one column narrower each row begins one entry earlier than the row above it.
    first = num_queries - 1
    rolled = rows.flatten(-2)[..., first : first + num_queries * (length - 1)]
    return rolled.unflatten(-1, (num_queries, length - 1))[..., :num_keys]


class RelativePosition(nn.Module):
    """The table of one layer: a number per head and bucket."""

    def __init__(self, config):
        super().__init__()
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.weight = nn.Parameter(torch.empty(config.num_attention_heads, self.num_buckets))

    def forward(self, distance):
        """distance: any shape, in tokens -> H, that shape."""
        return self.weight[:, distance_bucket(distance, self.num_buckets, self.max_distance)]
