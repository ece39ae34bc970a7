"""Where dropout acts. A mask that is the same in every call can be folded into weights: so a model
with such masks equals one with folded weights, unless a place is missing."""

import pytest
import torch
from torch import nn

from melodi_hf.models.modules import Attention

from .models import SYSTEMS, WINDOW, assert_differ, assert_near, build, draw, read_with_memory

FACTOR = 1.5  # of attention weights


class Mask(nn.Module):
    """Drops the same channels in every call, in evaluation too."""

    def __init__(self, channels):
        super().__init__()
        self.kept = 2.0 * (torch.rand(channels) < 0.5)

    def forward(self, x):
        return x * self.kept


def read(model, ids):
    """Logits of two calls; the second one projects what the first one left in memory."""
    return read_with_memory(model, ids.split(2 * WINDOW + 3, dim=1))


def fold(weight, factor):
    with torch.no_grad():
        weight.mul_(factor)


# The compression asks once more which states are attended to, then without dropout.
MASKED = [name for name in SYSTEMS if name != "compressive_transformer_most_used"]


@pytest.mark.parametrize("name", MASKED)
@torch.no_grad()
def test_dropout_follows_the_first_norm_the_feed_forward_network_and_the_last_norm(name):
    """Also where remembered tokens pass the first norm again."""
    model, folded, ids = build(name), build(name), draw(2, 5 * WINDOW)
    plain, places = read(model, ids), 0
    for module, other in zip(list(model.modules()), list(folded.modules()), strict=True):
        dropout = getattr(module, "dropout", None)
        if not isinstance(dropout, nn.Dropout) or isinstance(module, Attention):
            continue
        places += 1
        module.dropout = Mask(model.config.hidden_size)
        kept = module.dropout.kept
        if other is folded.model:
            fold(folded.model.norm.weight, kept)
        else:
            fold(other.input_layernorm.weight, kept)
            fold(other.mlp.down_proj.weight, kept[:, None])
            if other.mlp.down_proj.bias is not None:
                fold(other.mlp.down_proj.bias, kept)
    assert places == 1 + len(model.model.layers) + name.endswith("side")
    found = read(model, ids)
    assert_near(found, read(folded, ids))
    assert_differ(found, plain)


def fold_attention(layer, name, length):
    """Give the weights of a layer's attention a factor; `length`: heads times channels."""
    weight = layer.self_attn.o_proj.weight
    reader = getattr(layer, "memory_reader", None)
    if reader is None:  # of a state, which is attended to without dropout, the second half
        fold(weight[:, :length], FACTOR)
    elif name == "memorizing_transformer":  # its memory is
        gate = reader.combination.weight.sigmoid()
        scale = (1 - gate) * FACTOR + gate
        fold(weight, scale.repeat_interleave(length // len(scale)))
        reader.combination.weight.copy_((gate / scale).logit())


@pytest.mark.parametrize("name", SYSTEMS)
@torch.no_grad()
def test_dropout_of_attention_acts_on_windows_and_queue(name, monkeypatch):
    """Not where memory and window share one softmax, nor on a side layer or a recurrent state."""
    how = {"attention_dropout": 0.25, "attn_implementation": "eager"}
    model, folded, ids = build(name, **how).train(), build(name), draw(2, 5 * WINDOW)
    plain = read(folded, ids)
    for layer in folded.model.layers:
        fold_attention(layer, name, model.config.num_attention_heads * model.config.head_dim)

    def scale(x, p=0.5, training=True, inplace=False):
        return x * FACTOR if p == 0.25 and training else x

    monkeypatch.setattr(nn.functional, "dropout", scale)
    found = read(model, ids)
    assert_near(found, read(folded, ids))
    assert_differ(found, plain)
