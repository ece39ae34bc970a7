"""MELODI written out: one row, one window, one layer, one head, one token after the other.

What a query cannot see is left out of its sum instead of being masked, and keys and values are
computed again wherever they are read.
"""

import torch

from .blocks import attend, bucket, rms_norm, unit

OUTSIDE = "layer_stack/"  # of the layers
STACK = OUTSIDE + "melodi_layers_{}/"
SHORT = STACK + "short_memory/previous_mems_test"
LONG = STACK + "long_memory/previous_mems_test"


def empty_state(params, sizes, batch_size):
    channels = params["embed/embedding"].shape[1]
    state = {"windows_read": torch.zeros(batch_size, dtype=torch.long)}
    for i in range(sizes["num_layers"]):
        has_long = i in sizes["long_term_memory_layer_indices"]
        for name, length in (
            (SHORT, sizes["short_term_memory_size"]),
            (LONG, sizes["long_term_memory_size"] if has_long else 0),
        ):
            zeros = params["embed/embedding"].new_zeros(batch_size, length, channels)
            state[name.format(i)] = zeros
    return state


def read_row(params, sizes, memory, ids, mask_empty_memory):
    """Window after window through all layers: the order of the recurrence."""
    xs, us = ([[] for _ in range(sizes["num_layers"])] for _ in range(2))
    for window in ids.split(sizes["window_length"]):
        x, u = params["embed/embedding"][window], params["layer_stack/summary_embeddings"]
        read = int(memory["windows_read"])
        for i in range(sizes["num_layers"]):
            start = STACK.format(i) + "melodi_layer/"
            layer = {n[len(start) :]: t for n, t in params.items() if n.startswith(start)}
            short, queue = memory[SHORT.format(i)], memory[LONG.format(i)]
            seen = len(short), len(queue)  # how many of the latest slots
            if mask_empty_memory:
                written = read * sizes["long_term_memory_increment_size"]
                seen = len(short) if read else 0, min(written, len(queue))
            x, u, short, queue = read_window(layer, sizes, x, u, short, queue, seen)
            memory = memory | {SHORT.format(i): short, LONG.format(i): queue}
            xs[i].append(x)
            us[i].append(u)
        memory = memory | {"windows_read": memory["windows_read"] + 1}
    return [torch.cat(x) for x in xs], [torch.cat(u) for u in us], memory


def read_window(p, sizes, x, u, short, queue, seen):
    """One layer turns window (W D), summary (U D), short memory (S D) and queue into the next."""
    tokens = torch.cat((x, u))
    tokens = tokens + look_back(p, sizes, tokens, short, queue, seen)
    tokens = tokens + feed_forward(p, tokens)
    x, u = tokens[: len(x)], tokens[len(x) :]
    mixed = u
    if sizes["token_mixing"] and (len(short) or len(queue)):
        mixed = mix(p, "token_mixing_summary", x, u, residual=True)
    if len(queue) and sizes["long_term_memory_increment_size"]:
        pushed = mix(p, "long_mem_token_mixing", x, u, residual=False)
        queue = torch.cat((queue, pushed))[len(pushed) :]
    if len(short) and sizes["token_mixing"]:
        short = mix(p, "token_mixing_short", x, u, residual=len(short) == len(u))
    elif len(short):
        short = u
    return x, mixed, short, queue


def look_back(p, sizes, tokens, short, queue, seen):
    """What each token finds in [short memory, earlier tokens] and, gated, in the queue."""
    norm = p["tbase/pre_attn_layernorm/scale"]
    near = rms_norm(torch.cat((short, tokens)), norm)
    far = rms_norm(queue, norm)[len(queue) - seen[1] :]
    wq, wk, wv = (p[f"tbase/_kvq/{n}_layer/kernel"] for n in ("queries", "keys", "values"))
    heads = []
    for h, scale in enumerate(p["tbase/_kvq/attention_scale"]):
        cut = slice(h * sizes["head_size"], (h + 1) * sizes["head_size"])
        table = p["relative_positions/rel_embedding"][h]
        keys, values = unit(near @ wk[:, cut]), near @ wv[:, cut]
        answers = []
        for t in range(len(short), len(near)):
            query = unit(near[t] @ wq[:, cut])
            first = len(short) - seen[0]
            bias = table[[bucket(t - j, sizes) for j in range(first, t)]]  # never itself
            answer = attend(query, keys[first:t], values[first:t], bias, scale)
            if len(queue):
                gate = p["attn_gate"][h].sigmoid()
                other = attend(query, unit(far @ wk[:, cut]), far @ wv[:, cut], 0, scale)
                answer = gate * answer + (1 - gate) * other
            answers.append(answer)
        heads.append(torch.stack(answers))
    return torch.cat(heads, dim=1) @ p["tbase/post_attn_mlp/output_layer/kernel"]


def feed_forward(p, tokens):
    inner = rms_norm(tokens, p["tbase/pre_ffn_layernorm/scale"])
    inner = inner @ p["tbase/ffn/mlp_layer/input_layer/kernel"]
    inner = (inner + p["tbase/ffn/mlp_layer/input_layer/bias"]).relu()
    inner = inner @ p["tbase/ffn/mlp_layer/output_layer/kernel"]
    return inner + p["tbase/ffn/mlp_layer/output_layer/bias"]


def mix(p, name, x, u, residual):
    """Each new token is a weighted sum of the window's and the summary's, alike in all channels."""
    tokens = torch.cat((x, u))
    if residual:
        normed = (rms_norm(t, p[f"{name}/layernorm{i}/scale"]) for i, t in ((1, x), (2, u)))
        tokens = torch.cat(tuple(normed))
    weights, bias = p[f"{name}/lin_mix/kernel"], p[f"{name}/lin_mix/bias"]
    mixed = torch.stack([weights[:, o] @ tokens + bias[o] for o in range(len(bias))])
    return mixed + u if residual else mixed
