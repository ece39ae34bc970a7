"""Compressive Transformer: one row, one window, one layer, one head, one token after the other.

Parameters carry the names of the library, without `model.`. A layer's state is two lists of hidden
states, the memory and the compressed one; what is not there yet is not in them. Whatever is
attended to is projected again in every window.
"""

import torch

from .blocks import bucket, rms_norm, unit


def read_row(params, sizes, state, ids):
    """ids: T -> logits, the state after them, and for each layer the losses of its compressions."""
    losses, hidden = [[] for _ in state], []
    for window in ids.split(sizes["window_length"]):
        x, after = params["embed_tokens.weight"][window], []
        for i, (memory, compressed) in enumerate(state):
            start = f"layers.{i}."
            p = {n[len(start) :]: t for n, t in params.items() if n.startswith(start)}
            h = list(x)
            x, received = read_window(p, sizes, h, memory, compressed)
            if len(h) == sizes["window_length"]:
                if len(memory) == sizes["memory_length"]:
                    old = [m if bptt(sizes) else m.detach() for m in memory[: len(h)]]
                    new = compress(p, sizes, old, received)
                    losses[i] += loss_of(p, sizes, h, old, new)
                    compressed = (compressed + new)[-sizes["compressed_memory_length"] :]
                memory = (memory + h)[-sizes["memory_length"] :]
            after.append((memory, compressed))
        state = after
        hidden.append(rms_norm(x, params["norm.weight"]))
    table = params["embed_tokens.weight"]
    return torch.cat(hidden) @ table.T * table.shape[1] ** -0.5, state, losses


def bptt(sizes):
    """Whether gradients flow through the compressed memory, because nothing else would train it."""
    return sizes["compression_loss"] == "none" and "conv" in sizes["compression"]


def read_window(p, sizes, h, memory, compressed):
    """The window after the layer (W D), and the attention that each state in memory received."""
    remembered = [z if bptt(sizes) else z.detach() for z in compressed]
    remembered += [m.detach() for m in memory]
    rate = sizes["compression_rate"] if sizes["compressed_position"] == "scaled" else 1
    # How many tokens a slot lies before the window: the newest of the memory one.
    before = [len(memory) + rate * (len(compressed) - j) for j in range(len(compressed))]
    before += [len(memory) - j for j in range(len(memory))]
    received, heads = [0.0] * len(memory), []
    for head in range(sizes["num_attention_heads"]):
        q = project(p, "q_proj", head, sizes, h, normed=True)
        k = project(p, "k_proj", head, sizes, remembered + h, normed=True)
        v = project(p, "v_proj", head, sizes, remembered + h)
        table, scale = p["self_attn.position.weight"][head], p["self_attn.temperature.weight"][head]
        found = []
        for t in range(len(h)):
            seen = len(remembered) + t  # all before it, not itself
            distances = [t + b for b in before] + list(range(t, 0, -1))
            bias = table[[bucket(d, sizes) for d in distances]]
            weights = ((k[:seen] @ q[t] + bias) * scale.abs()).softmax(0)
            found.append(weights @ v[:seen])  # zero if nothing is seen
            for j in range(len(memory)):
                received[j] += weights[len(compressed) + j].item()
        heads.append(torch.stack(found))
    found = torch.cat(heads, dim=1)
    x = torch.stack(h) + found @ p["self_attn.o_proj.weight"].T
    inner = rms_norm(x, p["post_attention_layernorm.weight"]) @ p["mlp.up_proj.weight"].T
    return x + inner.relu() @ p["mlp.down_proj.weight"].T, received


def project(p, name, head, sizes, states, normed=False):
    cut = slice(head * sizes["head_dim"], (head + 1) * sizes["head_dim"])
    h = rms_norm(torch.stack(states), p["input_layernorm.weight"])
    h = h @ p[f"self_attn.{name}.weight"][cut].T
    return unit(h) if normed else h


def compress(p, sizes, old, received):
    rate, kind = sizes["compression_rate"], sizes["compression"]
    groups = [old[j : j + rate] for j in range(0, len(old), rate)]
    if kind == "max_pool":
        return [torch.stack(group).max(0).values for group in groups]
    if kind == "mean_pool":
        return [sum(group) / rate for group in groups]
    if kind == "most_used":
        order = sorted(range(len(old)), key=lambda j: -received[j])
        return [old[j] for j in sorted(order[: len(groups)])]
    if kind == "dilated_conv":
        old = look_around(p, old)
        groups = [old[j : j + rate] for j in range(0, len(old), rate)]
    weight, bias = p["compression.proj.weight"], p["compression.proj.bias"]
    kernel = weight.split(len(old[0]), dim=1)  # one matrix for each of the states of a group
    return [sum(w @ m for w, m in zip(kernel, group, strict=True)) + bias for group in groups]


def look_around(p, old):
    """Dilated convolutions, each added to what it read; beyond the ends there are zeros."""
    for layer, dilation in enumerate((1, 2)):
        weight, bias = (p[f"compression.dilated.{layer}.{name}"] for name in ("weight", "bias"))
        new = []
        for t in range(len(old)):
            y = bias
            for tap, place in enumerate((t - dilation, t, t + dilation)):
                if 0 <= place < len(old):
                    y = y + weight[:, :, tap] @ old[place]
            new.append(old[t] + y.relu())
        old = new
    return old


def loss_of(p, sizes, h, old, new):
    if sizes["compression_loss"] == "none":
        return []
    if sizes["compression_loss"] == "autoencoding":
        weight, bias = p["reconstruction.proj.weight"], p["reconstruction.proj.bias"]
        again = [part for z in new for part in (weight @ z + bias).split(len(z))]
        return [(torch.stack(again) - torch.stack(old)).square().mean()]
    p = {name: weight.detach() for name, weight in p.items()}
    difference = []
    for head in range(sizes["num_attention_heads"]):
        q = project(p, "q_proj", head, sizes, [token.detach() for token in h], normed=True)
        scale, answers = p["self_attn.temperature.weight"][head].abs(), []
        for states in (old, new):
            k = project(p, "k_proj", head, sizes, states, normed=True)
            v = project(p, "v_proj", head, sizes, states)
            answers.append(torch.stack([(k @ query * scale).softmax(0) @ v for query in q]))
        difference.append(answers[0] - answers[1])
    return [torch.cat(difference, dim=1).square().mean()]
