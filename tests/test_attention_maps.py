"""Attention maps agree with the outputs of attention: they are the derivatives by the values."""

import pytest
import torch

from melodi_hf.models.modeling_compressive_transformer import CompressiveLayer
from melodi_hf.models.modeling_elastic_memory import ElasticMemoryLayer
from melodi_hf.models.modeling_melodi import LongTermMelodiLayer, MelodiLayer

from .models import DOCUMENT, VARIED, WINDOW, assert_near, build, draw

CHANNEL = 1  # of each head; a weight of attention is the same for all

MORE = ["elastic_memory_sliding", "block_recurrent_two", "memorizing_transformer_joint"]


def recorded(layer):
    """Lists that take what comes out of v_proj and what goes into o_proj."""
    values, found = [], []
    layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: values.append(out))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    return values, found


def places(layer):
    """Where the columns of the text lie among the tokens of a layer, summary tokens included."""
    columns = torch.arange(DOCUMENT)
    summaries = layer.num_summaries if isinstance(layer, MelodiLayer) else 0
    return columns + columns // WINDOW * summaries


def derivative(layer, values, found):
    """H T T, of the outputs of attention by the values of the call's tokens."""
    heads, place = layer.self_attn.num_heads, places(layer)
    per_head = values[0].shape[-1] // heads
    channels = torch.arange(heads) * per_head + CHANNEL
    found = torch.cat(found, dim=1)[0, place][:, channels]  # T H; behind them is a state's
    sources = [values[0]]
    if isinstance(layer, CompressiveLayer):  # which projects windows again as it remembers them
        sources += values[3::2]
    rows = []
    for output in found:
        grads = torch.autograd.grad(output.sum(), sources, retain_graph=True, allow_unused=True)
        grads = [
            torch.zeros_like(source) if grad is None else grad
            for grad, source in zip(grads, sources, strict=True)
        ]
        row = grads[0][0, place][:, channels]
        if len(grads) > 1:
            again = torch.cat(grads[1:], dim=1)[0][:, channels]
            row[: len(again)] += again
        rows.append(row.T)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("name", [*VARIED, *MORE])
def test_maps_are_derivatives_of_what_was_attended_to(name):
    model, ids = build(name).double(), draw(1, DOCUMENT)
    lists = [recorded(layer) for layer in model.model.layers]
    maps = model(ids, output_attentions=True, use_cache=False).attentions
    window = torch.arange(DOCUMENT) // WINDOW
    for layer, found, (values, attended) in zip(model.model.layers, maps, lists, strict=True):
        wanted = derivative(layer, values, attended)
        if isinstance(layer, (MelodiLayer, ElasticMemoryLayer)):
            # Windows before are seen through memories, which are not shown.
            wanted = wanted * (window[:, None] == window)
        if isinstance(layer, LongTermMelodiLayer):  # whose gate is not part of the weights
            wanted = wanted / layer.gate[:, CHANNEL].sigmoid()[:, None, None]
        assert wanted.max() > 0.1
        assert_near(found[0], wanted)
