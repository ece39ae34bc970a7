"""Transformer-XL with a sliding window: one row, one layer, one head, one token after the other.

Every token sees the W tokens before it, not itself; those before the segment are in the cache.
"""

import torch

from .blocks import attend, bucket, rms_norm, unit

OUTSIDE = "layer_stack/"  # of the layers
STACK = OUTSIDE + "transformer{}/"
KEYS = STACK + "kvi_cache/previous_keys_test"
VALUES = STACK + "kvi_cache/previous_values_test"


def empty_state(params, sizes, batch_size):
    shape = batch_size, sizes["window_length"], sizes["num_heads"], sizes["head_size"]
    state = {"tokens_read": torch.zeros(batch_size, dtype=torch.long)}
    for i in range(sizes["num_layers"]):
        for name in (KEYS, VALUES):
            state[name.format(i)] = params["embed/embedding"].new_zeros(shape)
    return state


def read_row(params, sizes, memory, ids, mask_empty_memory):
    x, xs = params["embed/embedding"][ids], []
    seen = sizes["window_length"]  # how many of the latest slots of the cache
    if mask_empty_memory:
        seen = min(seen, int(memory["tokens_read"]))
    after = {"tokens_read": memory["tokens_read"] + len(ids)}
    for i in range(sizes["num_layers"]):
        start = STACK.format(i)
        p = {n[len(start) :]: t for n, t in params.items() if n.startswith(start)}
        cache = memory[KEYS.format(i)], memory[VALUES.format(i)]
        found, after[KEYS.format(i)], after[VALUES.format(i)] = look_back(p, sizes, x, cache, seen)
        x = x + found
        x = x + feed_forward(p, rms_norm(x, p["tbase/pre_ffn_layernorm/scale"]))
        xs.append(x)
    return xs, after


def feed_forward(p, x):
    """Without biases, or with them under other names: two classes of the released code."""
    if "tbase/ffn/hidden0/kernel" in p:
        return (x @ p["tbase/ffn/hidden0/kernel"]).relu() @ p["tbase/ffn/output_layer/kernel"]
    p = {n.removeprefix("tbase/ffn/mlp_layer/"): t for n, t in p.items()}
    inner = (x @ p["input_layer/kernel"] + p["input_layer/bias"]).relu()
    return inner @ p["output_layer/kernel"] + p["output_layer/bias"]


def look_back(p, sizes, x, cache, seen):
    """What each token finds in the W before it; then the keys and values of the last W tokens."""
    x, length = rms_norm(x, p["tbase/pre_attn_layernorm/scale"]), sizes["window_length"]
    wq, wk, wv = (p[f"tbase/_kvq/{n}_layer/kernel"] for n in ("queries", "keys", "values"))
    heads, last_keys, last_values = [], [], []
    for h, scale in enumerate(p["tbase/_kvq/attention_scale"]):
        cut = slice(h * sizes["head_size"], (h + 1) * sizes["head_size"])
        table = p["relative_positions/rel_embedding"][h]
        keys = torch.cat((cache[0][:, h], unit(x @ wk[:, cut])))
        values = torch.cat((cache[1][:, h], x @ wv[:, cut]))
        answers = []
        for t in range(length, length + len(x)):  # the cache lies in front
            first = max(t - length, length - seen)
            bias = table[[bucket(t - j, sizes) for j in range(first, t)]]
            query = unit(x[t - length] @ wq[:, cut])
            answers.append(attend(query, keys[first:t], values[first:t], bias, scale))
        heads.append(torch.stack(answers))
        last_keys.append(keys[-length:])
        last_values.append(values[-length:])
    found = torch.cat(heads, dim=1) @ p["tbase/post_attn_mlp/output_layer/kernel"]
    return found, torch.stack(last_keys, dim=1), torch.stack(last_values, dim=1)
