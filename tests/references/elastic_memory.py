"""Elastic Memory without a recurrence: one row, one layer, one head, one token after the other.

Every layer keeps the keys and values of all tokens. Before each block the whole past is projected
on shifted Legendre polynomials, written out in powers, and reconstructed from its coefficients.
"""

from math import comb, sqrt

import torch

from .blocks import attend, bucket, rms_norm, unit

OUTSIDE = "layer_stack/"  # of the layers
STACK = OUTSIDE + "transformer{}/"
KEYS, VALUES = STACK + "keys", STACK + "values"
LONGEST = 64  # tokens of a document


def empty_state(params, sizes, batch_size):
    shape = batch_size, LONGEST, sizes["num_heads"], sizes["head_size"]
    state = {"tokens_read": torch.zeros(batch_size, dtype=torch.long)}
    for i in range(sizes["num_layers"]):
        for name in (KEYS, VALUES):
            state[name.format(i)] = params["embed/embedding"].new_zeros(shape)
    return state


def powers(n):
    """The coefficients of √(2n+1) P_n(2x - 1) in powers of x."""
    return [sqrt(2 * n + 1) * (-1) ** (n + k) * comb(n, k) * comb(n + k, k) for k in range(n + 1)]


def project(past, order):
    """T K -> the integral of each polynomial with the past, a step of width 1/T per token: N K."""
    coefficients = []
    for n in range(order):
        total = 0
        for j, token in enumerate(past):
            integral = 0
            for k, a in enumerate(powers(n)):
                step = ((j + 1) / len(past)) ** (k + 1) - (j / len(past)) ** (k + 1)
                integral += a * step / (k + 1)
            total = total + integral * token
        coefficients.append(total)
    return torch.stack(coefficients)


def points(sizes, tokens):
    count = sizes["samples"]
    for j in range(1, count + 1):
        if sizes["sampling"] == "uniform":
            yield (j - 0.5) / count
        else:
            age = tokens ** ((count - j) / (count - 1))
            yield 1 - age / tokens + 0.5 / tokens


def reconstruct(past, sizes):
    """T K -> M K."""
    coefficients = project(past, sizes["order"])
    found = []
    for x in points(sizes, len(past)):
        at = [sum(a * x**k for k, a in enumerate(powers(n))) for n in range(sizes["order"])]
        found.append(sum(value * c for value, c in zip(at, coefficients, strict=True)))
    return torch.stack(found)


def read_row(params, sizes, memory, ids, mask_empty_memory):
    x, xs, after = params["embed/embedding"][ids], [], dict(memory)
    after["tokens_read"] = memory["tokens_read"] + len(ids)
    for i in range(sizes["num_layers"]):
        start = STACK.format(i)
        p = {n[len(start) :]: t for n, t in params.items() if n.startswith(start)}
        held = memory[KEYS.format(i)], memory[VALUES.format(i)]
        has_memory, read = i in sizes["memory_layers"], int(memory["tokens_read"])
        found, *new = look_back(p, sizes, x, held, read, has_memory, mask_empty_memory)
        after[KEYS.format(i)], after[VALUES.format(i)] = new
        x = x + found
        inner = rms_norm(x, p["tbase/pre_ffn_layernorm/scale"]) @ p["tbase/ffn/hidden0/kernel"]
        x = x + inner.relu() @ p["tbase/ffn/output_layer/kernel"]
        xs.append(x)
    return xs, after


def look_back(p, sizes, x, held, read, has_memory, masked):
    """What each token finds in its block and before it; then the keys and values of all tokens."""
    x, end = rms_norm(x, p["tbase/pre_attn_layernorm/scale"]), read + len(x)
    wq, wk, wv = (p[f"tbase/_kvq/{n}_layer/kernel"] for n in ("queries", "keys", "values"))
    heads, all_keys, all_values = [], [], []
    for h, scale in enumerate(p["tbase/_kvq/attention_scale"]):
        cut = slice(h * sizes["head_size"], (h + 1) * sizes["head_size"])
        keys = torch.cat((held[0][:read, h], unit(x @ wk[:, cut])))
        values = torch.cat((held[1][:read, h], x @ wv[:, cut]))
        table, pasts, answers = p["relative_positions/rel_embedding"][h], {}, []
        for t in range(read, end):
            first = t - t % sizes["window_length"]
            if has_memory and first not in pasts:
                pasts[first] = remembered(keys[:first], values[:first], sizes, masked)
            if sizes["sliding"] and not has_memory:
                first = max(0, t - sizes["window_length"])
                far = missing(keys, table, t, sizes, masked)
            else:
                far = pasts.get(first, (keys[:0], values[:0], table[:0]))
            bias = table[[bucket(t - j, sizes) for j in range(first, t)]]
            near = keys[first:t], values[first:t], bias
            seen = (torch.cat(both) for both in zip(far, near, strict=True))
            answers.append(attend(unit(x[t - read] @ wq[:, cut]), *seen, scale))
        heads.append(torch.stack(answers))
        room = keys.new_zeros(LONGEST - end, keys.shape[1])
        all_keys.append(torch.cat((keys, room)))
        all_values.append(torch.cat((values, room)))
    found = torch.cat(heads, dim=1) @ p["tbase/post_attn_mlp/output_layer/kernel"]
    return found, torch.stack(all_keys, dim=1), torch.stack(all_values, dim=1)


def remembered(keys, values, sizes, masked):
    """Keys and values of points of the past, and their bias: they have no distance."""
    if len(keys):
        return (
            reconstruct(keys, sizes),
            reconstruct(values, sizes),
            keys.new_zeros(sizes["samples"]),
        )
    empty = keys.new_zeros(0 if masked else sizes["samples"], values.shape[1])
    return empty, empty, empty[:, 0]


def missing(keys, table, t, sizes, masked):
    """Before the document there are zeros, each at its distance."""
    slots = 0 if masked else max(0, sizes["window_length"] - t)
    empty = keys.new_zeros(slots, keys.shape[1])
    return empty, empty, table[[bucket(t + n, sizes) for n in range(slots, 0, -1)]]
