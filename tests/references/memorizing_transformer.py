"""The Memorizing Transformer: one row, one layer, one head, one token after the other.

One of the layers, or a side layer behind it, looks back at what was written after earlier windows,
or segments, as a constant: at all of it or at the nearest, through a gate or in one softmax. What
it sees is picked slot by slot; what it does not see is left out of the sums.
"""

import torch

from . import transformer_xl
from .blocks import attend, bucket, rms_norm, unit

OUTSIDE = "layer_stack/"  # of the layers
STACK = transformer_xl.STACK
SIDE = "layer_stack/side_layer/"
PARTS = ("keys", "values")


def is_side(sizes):
    return sizes.get("placement", "side") == "side"


def memory_name(sizes, part):
    place = SIDE if is_side(sizes) else STACK.format(sizes["memory_layer_indices"][0])
    return f"{place}recurrent_memory/memory_{part}_test"


def empty_state(params, sizes, batch_size):
    state = transformer_xl.empty_state(params, sizes, batch_size)
    shape = batch_size, sizes["memory_size"], sizes["num_heads"], sizes["head_size"]
    for part in PARTS:
        state[memory_name(sizes, part)] = params["embed/embedding"].new_zeros(shape)
    # Of the ring, where the next token goes. It is not set back when a document begins.
    return state | {"write_index_read": torch.zeros(batch_size, dtype=torch.long)}


def read_row(params, sizes, memory, ids, mask_empty_memory):
    """What leaves each layer; what enters the side layer and what it makes of it."""
    x, xs, beside = params["embed/embedding"][ids], [], []
    after = {"tokens_read": memory["tokens_read"] + len(ids)}
    seen = min(sizes["window_length"], int(memory["tokens_read"]))
    seen = seen if mask_empty_memory else sizes["window_length"]
    remembered = Remembered(sizes, memory, mask_empty_memory)
    for i in range(sizes["num_layers"]):
        p = below(params, STACK.format(i))
        names = [STACK.format(i) + f"kvi_cache/previous_{part}_test" for part in PARTS]
        cache = [memory[name] for name in names]
        remembers = i in sizes["memory_layer_indices"]
        if remembers and not is_side(sizes):
            found, *last = look_back(p, sizes, x, cache, seen, remembered)
        else:
            found, *last = transformer_xl.look_back(p, sizes, x, cache, seen)
        after |= dict(zip(names, last, strict=True))
        x = x + found
        x = x + feed_forward(p, x)
        if remembers and is_side(sizes):
            y = read_beside(below(params, SIDE), sizes, x, remembered)
            beside = [x, y]
            x = x + y if sizes.get("side_residual", "double") == "double" else y
        xs.append(x)
    return xs, beside, after | remembered.state()


def below(params, start):
    return {n[len(start) :]: t for n, t in params.items() if n.startswith(start)}


class Remembered:
    """The ring of one row."""

    def __init__(self, sizes, memory, mask_empty_memory):
        self.sizes, self.index = sizes, int(memory["write_index_read"])
        self.ring = {part: memory[memory_name(sizes, part)].clone() for part in PARTS}
        self.count = int(memory["tokens_read"])  # written since the document began
        self.hides = mask_empty_memory or sizes.get("retrieval") == "top_k"

    def seen(self, query, head):
        """Keys and values that a query sees, the oldest first."""
        slots = len(self.ring["keys"])
        order = [(self.index + slot) % slots for slot in range(slots)]
        order = order[max(0, slots - self.count) :] if self.hides else order
        keys, values = (self.ring[part][order, head] for part in PARTS)
        if self.sizes.get("retrieval") == "top_k":
            nearest = (keys @ query).sort(descending=True).indices[: self.sizes["num_retrieved"]]
            keys, values = keys[nearest], values[nearest]
        return keys, values

    def write(self, **new):
        """Keys and values W H K, as constants."""
        for t in range(len(new["keys"])):
            for part in PARTS:
                self.ring[part][self.index] = new[part][t].detach()
            self.index = (self.index + 1) % len(self.ring["keys"])
        self.count += len(new["keys"])

    def state(self):
        state = {memory_name(self.sizes, part): self.ring[part] for part in PARTS}
        return state | {"write_index_read": torch.tensor(self.index)}


def combine(p, sizes, head, query, near, far, bias):
    """Through a gate, or as one softmax, in which what is far has no bias."""
    scale = p["tbase/_kvq/attention_scale"][head]
    if sizes.get("memory_combination", "joint") == "gate":
        gate = p["attn_gate"][head].sigmoid()
        return gate * attend(query, *far, 0, scale) + (1 - gate) * attend(query, *near, bias, scale)
    keys, values = (torch.cat(pair) for pair in zip(far, near, strict=True))
    bias = torch.cat((query.new_zeros(len(far[0])), bias + query.new_zeros(len(near[0]))))
    return attend(query, keys, values, bias, scale)


def projected(p, sizes, x):
    """Queries, keys and values of a row: T H K."""
    x = rms_norm(x, p["tbase/pre_attn_layernorm/scale"])
    q, k, v = (x @ p[f"tbase/_kvq/{n}_layer/kernel"] for n in ("queries", "keys", "values"))
    q, k, v = (t.unflatten(1, (sizes["num_heads"], sizes["head_size"])) for t in (q, k, v))
    return unit(q), unit(k), v


def look_back(p, sizes, x, cache, seen, remembered):
    """A layer of the stack: the W tokens before each, and the memory, window by window."""
    length = sizes["window_length"]
    queries, keys, values = projected(p, sizes, x)
    keys, values = torch.cat((cache[0], keys)), torch.cat((cache[1], values))
    answers = []
    for begin in range(length, length + len(x), length):
        for t in range(begin, min(begin + length, length + len(x))):
            first, heads = max(t - length, length - seen), []
            for h in range(sizes["num_heads"]):
                query, bias = queries[t - length, h], 0
                if sizes.get("position_bias", True):
                    table = p["relative_positions/rel_embedding"][h]
                    bias = table[[bucket(t - j, sizes) for j in range(first, t)]]
                near, far = (keys[first:t, h], values[first:t, h]), remembered.seen(query, h)
                heads.append(combine(p, sizes, h, query, near, far, bias))
            answers.append(torch.cat(heads))
        window = slice(begin, begin + length)
        remembered.write(keys=keys[window], values=values[window])
    found = torch.stack(answers) @ p["tbase/post_attn_mlp/output_layer/kernel"]
    return found, keys[-length:], values[-length:]


def read_beside(p, sizes, x, remembered):
    """The side layer: all tokens before in the segment, and the memory."""
    queries, keys, values = projected(p, sizes, x)
    answers = []
    for t in range(len(x)):
        heads = []
        for h in range(sizes["num_heads"]):
            near, far = (keys[:t, h], values[:t, h]), remembered.seen(queries[t, h], h)
            heads.append(combine(p, sizes, h, queries[t, h], near, far, 0))
        answers.append(torch.cat(heads))
    remembered.write(keys=keys, values=values)
    x = x + torch.stack(answers) @ p["tbase/post_attn_mlp/output_layer/kernel"]
    return x + feed_forward(p, x)


def feed_forward(p, x):
    x = rms_norm(x, p["tbase/pre_ffn_layernorm/scale"])
    if "tbase/ffn/hidden0/kernel" in p:
        return (x @ p["tbase/ffn/hidden0/kernel"]).relu() @ p["tbase/ffn/output_layer/kernel"]
    up, down = (f"tbase/ffn/mlp_layer/{name}_layer/" for name in ("input", "output"))
    inner = (x @ p[up + "kernel"] + p[up + "bias"]).relu()
    return inner @ p[down + "kernel"] + p[down + "bias"]
