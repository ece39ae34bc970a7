"""The Block-Recurrent Transformer written out: one row, one layer, one token after the other.

A token sees the W tokens before it and the state that the window before its own left. Behind the
last token of a window the state reads all that lies in it, and in the window before.
"""

import torch

from .blocks import attend, bucket, rms_norm, unit

OUTSIDE = ""  # of the layers
STACK = "transformer{}/"
KEYS, VALUES = STACK + "previous_keys_test", STACK + "previous_values_test"
EARLIER_KEYS, EARLIER_VALUES = STACK + "earlier_keys", STACK + "earlier_values"
STATE = STACK + "recurrent_state_test"
STATE_KEYS, STATE_VALUES = STACK + "state_keys", STACK + "state_values"


def empty_state(params, sizes, batch_size):
    zeros = params["embed/embedding"].new_zeros
    heads, vectors = (sizes["num_heads"], sizes["head_size"]), sizes["recurrent_num_states"]
    state = {"tokens_read": torch.zeros(batch_size, dtype=torch.long)}
    for i in range(sizes["num_layers"]):
        for name in (KEYS, VALUES, EARLIER_KEYS, EARLIER_VALUES):
            state[name.format(i)] = zeros(batch_size, sizes["window_length"], *heads)
        if is_recurrent(sizes, i):
            state[STATE.format(i)] = zeros(batch_size, vectors, params["embed/embedding"].shape[1])
            for name in (STATE_KEYS, STATE_VALUES):
                state[name.format(i)] = zeros(batch_size, vectors, *heads)
    return state


def is_recurrent(sizes, i):
    return i in [index % sizes["num_layers"] for index in sizes["recurrent_layer_indices"]]


def read_row(params, sizes, memory, ids, mask_empty_memory):
    x, xs = params["embed/embedding"][ids], []
    after = {"tokens_read": memory["tokens_read"] + len(ids)}
    for i in range(sizes["num_layers"]):
        start = STACK.format(i)
        p = {n[len(start) :]: t for n, t in params.items() if n.startswith(start)}
        held = {n[len(start) :]: t for n, t in memory.items() if n.startswith(start)}
        held["tokens_read"] = int(memory["tokens_read"])
        found, held = look_back(p, sizes, x, held, mask_empty_memory)
        x = x + found @ p["tbase/post_attn_mlp/output_layer/kernel"]
        inner = rms_norm(x, p["tbase/pre_ffn_layernorm/scale"]) @ p["tbase/ffn/hidden0/kernel"]
        x = x + inner.relu() @ p["tbase/ffn/output_layer/kernel"]
        xs.append(x)
        after |= {start + name: tensor for name, tensor in held.items()}
    return xs, after


def heads_of(p, name, x, sizes, scaled_to_one=True):
    """The projection of tokens (T D) or of one (D), head by head."""
    x = (x @ p[name]).unflatten(-1, (sizes["num_heads"], sizes["head_size"]))
    return unit(x) if scaled_to_one else x


def look_back(p, sizes, x, held, masked):
    """What each token finds (T H*K, twice as wide with a state); and what is held after them."""
    length, read = sizes["window_length"], held["tokens_read"]
    h = rms_norm(x, p["tbase/_kvq/pre_attn_layernorm/scale"])
    keys, values = keys_and_values(p, "tbase", h, sizes)
    keys = torch.cat((held["earlier_keys"], held["previous_keys_test"], keys))
    values = torch.cat((held["earlier_values"], held["previous_values_test"], values))
    first_real = 2 * length - read if masked else 0  # of all keys that are held
    state = held.get("recurrent_state_test")
    its_keys, its_values = held.get("state_keys"), held.get("state_values")
    answers = []
    for t in range(len(x)):
        place = 2 * length + t
        first = max(place - length, first_real)
        answer = own_answer(p, sizes, h[t], keys[first:place], values[first:place])
        if state is not None:
            if (read + t) % length == 0:  # a window begins
                current = named(p, state if read + t else p["recurrent_initial_state"])
                its_keys, its_values = keys_and_values(p, "recurrent_tbase", current, sizes)
            other = other_answer(p, "tbase", sizes, h[t], its_keys, its_values)
            answer = torch.cat((answer, other))
            if (read + t + 1) % length == 0:  # and ends
                current = state if read + t >= length else p["recurrent_initial_state"]
                span = 2 * length if sizes.get("state_reads_previous_window", True) else length
                first = max(place + 1 - span, first_real)
                seen = keys[first : place + 1], values[first : place + 1]
                state = next_state(p, sizes, current, (its_keys, its_values), seen)
        answers.append(answer)
    after = {
        "previous_keys_test": keys[-length:],
        "previous_values_test": values[-length:],
        "earlier_keys": keys[-2 * length : -length],
        "earlier_values": values[-2 * length : -length],
    }
    if state is not None:
        after |= {"recurrent_state_test": state, "state_keys": its_keys, "state_values": its_values}
    return torch.stack(answers), after


def keys_and_values(p, base, h, sizes):
    keys = heads_of(p, f"{base}/_kvq/keys_layer/kernel", h, sizes)
    return keys, heads_of(p, f"{base}/_kvq/values_layer/kernel", h, sizes, scaled_to_one=False)


def own_answer(p, sizes, token, keys, values):
    """One token's answer from the tokens before it, the last of the keys directly before it."""
    query = heads_of(p, "tbase/_kvq/queries_layer/kernel", token, sizes)
    answer = []
    for head, scale in enumerate(p["tbase/_kvq/attention_scale"]):
        table = p["relative_positions/rel_embedding"][head]
        bias = table[[bucket(len(keys) - j, sizes) for j in range(len(keys))]]
        answer.append(attend(query[head], keys[:, head], values[:, head], bias, scale))
    return torch.cat(answer)


def other_answer(p, base, sizes, vector, keys, values):
    """One token's answer from the state, or one state vector's from the tokens."""
    query = heads_of(p, f"{base}/_kvq/queries2_layer/kernel", vector, sizes)
    return torch.cat(
        [
            attend(query[head], keys[:, head], values[:, head], 0, scale)
            for head, scale in enumerate(p[f"{base}/attention_scale2"])
        ]
    )


def named(p, state):
    """Normalised, then told apart."""
    normed = rms_norm(state, p["recurrent_tbase/_kvq/pre_attn_layernorm/scale"])
    return normed + p["recurrent_tbase/_kvq/position_embeddings"]


def next_state(p, sizes, state, own, tokens):
    """Vector after vector: what it finds in the state and in the tokens, through its gates."""
    inner = {n.removeprefix("recurrent_tbase/"): t for n, t in p.items() if "recurrent_tbase" in n}
    after = []
    for old, h in zip(state, named(p, state), strict=True):
        query = heads_of(inner, "_kvq/queries_layer/kernel", h, sizes)
        found = [
            attend(query[head], own[0][:, head], own[1][:, head], 0, scale)
            for head, scale in enumerate(inner["_kvq/attention_scale"])
        ]
        found = torch.cat((*found, other_answer(p, "recurrent_tbase", sizes, h, *tokens)))
        after.append(updated(inner, sizes["gate_config"], old, found))
    return torch.stack(after)


def updated(p, gates, old, found):
    """The three configurations, one vector at a time."""
    if "single" in gates:
        hidden = (found @ p["ffn/hidden0/kernel"]).relu()
        return gated(p, "ffn", old, (hidden @ p["ffn/output_layer/kernel"]).tanh(), hidden)
    new = gated(p, "post_attn_mlp", old, found @ p["post_attn_mlp/output_layer/kernel"], found)
    if "skip" in gates:
        return new
    hidden = (rms_norm(new, p["pre_ffn_layernorm/scale"]) @ p["ffn/hidden0/kernel"]).relu()
    return gated(p, "ffn", new, hidden @ p["ffn/output_layer/kernel"], hidden)


def gated(p, block, old, proposal, hidden):
    """A fixed share, one that the content decides on, or an LSTM's two gates."""
    if f"{block}/gate_bias" in p:
        kept = p[f"{block}/gate_bias"].sigmoid()
        return kept * old + (1 - kept) * proposal
    if f"{block}/gate_layer/kernel" in p:
        kept = (asked(p, f"{block}/gate_layer", hidden) + 1).sigmoid()
        return kept * old + (1 - kept) * proposal
    kept = (asked(p, f"{block}/forget_gate", hidden) + 1).sigmoid()
    let_in = (asked(p, f"{block}/input_gate", hidden) - 1).sigmoid()
    return kept * old + let_in * proposal


def asked(p, gate, hidden):
    return hidden @ p[f"{gate}/kernel"] + p[f"{gate}/bias"]
