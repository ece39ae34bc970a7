"""What the naive twins share: norms, distances, the answer to one query, rows one after the other.

A twin is `empty_state` and `read_row`. Parameters, state and sizes carry the names of the released
JAX code and its golden files.
"""

import math

import torch


def read_segment(twin, params, sizes, state, ids, start, mask_empty_memory=False):
    """Read B T tokens -> logits, hidden, what left the layers (xs and, if any, us), next state."""
    before = twin.empty_state(params, sizes, len(ids)) | state
    rows = []
    for row in range(len(ids)):
        kept = {name: not start[row] or name == "write_index_read" for name in before}
        memory = {name: value[row] * kept[name] for name, value in before.items()}
        rows.append(twin.read_row(params, sizes, memory, ids[row], mask_empty_memory))
    *left, states = zip(*rows, strict=True)
    xs, *us = ([torch.stack(layer) for layer in zip(*kind, strict=True)] for kind in left)
    table = params["embed/embedding"]
    hidden = rms_norm(xs[-1], params[f"{twin.OUTSIDE}final_layernorm/scale"])
    return {
        "logits": hidden @ table.T / math.sqrt(table.shape[1]),
        "hidden": hidden,
        "xs": xs,
        "us": us[0] if us else [],
        "state": {name: torch.stack([state[name] for state in states]) for name in before},
    }


def next_token_loss(logits, ids):
    """The mean over all tokens but each row's first, one after the other."""
    losses = [
        logits[row, t].logsumexp(0) - logits[row, t, ids[row, t + 1]]
        for row in range(ids.shape[0])
        for t in range(ids.shape[1] - 1)
    ]
    return torch.stack(losses).mean()


def rms_norm(x, scale):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * scale


def unit(x):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def bucket(distance, sizes):
    """T5: near distances have a bucket each, far ones share it in logarithmic steps."""
    count, farthest = sizes["t5_num_buckets"], sizes["t5_max_distance"]
    near = count // 2
    if distance < near:
        return distance
    return min(count - 1, near + int(math.log(distance / near, farthest / near) * (count - near)))


def attend(query, keys, values, bias, scale):
    """Answer one query; one more key, of logit -1000 and value zero, is there when none is seen."""
    logits = (keys @ query + bias) * scale.abs()
    return torch.cat((logits, logits.new_tensor([-1000.0]))).softmax(0)[:-1] @ values
