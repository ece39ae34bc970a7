"""Attention maps agree with the outputs of attention: they are the derivatives by the values."""

import pytest
import torch

from melodi_hf.models.modeling_compressive_transformer import CompressiveLayer
from melodi_hf.models.modeling_elastic_memory import ElasticMemoryLayer
from melodi_hf.models.modeling_melodi import LongTermMelodiLayer, MelodiLayer

from .models import DOCUMENT, SYSTEMS, WINDOW, assert_near, build, draw

CHANNEL = 1  # of each head; a weight of attention is the same for all


def record(layer):
    """Lists of what goes through q_proj, v_proj and into o_proj."""
    queries, values, found, attention = [], [], [], layer.self_attn
    attention.q_proj.register_forward_pre_hook(lambda module, args: queries.append(args[0]))
    attention.v_proj.register_forward_hook(lambda module, args, out: values.append((args[0], out)))
    attention.o_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    return queries, values, found


def places(layer):
    """The columns of the text among the tokens of a layer, summary tokens included."""
    columns = torch.arange(DOCUMENT)
    summaries = layer.config.num_summary_tokens if isinstance(layer, MelodiLayer) else 0
    return columns + columns // WINDOW * summaries


def derivative(layer, queries, values, found):
    """Differentiate the outputs of attention by the values of the call's tokens: H T T."""
    heads, place = layer.self_attn.num_heads, places(layer)
    sources = [out for given, out in values if any(given is q for q in queries)]
    others = [out for given, out in values if not any(given is q for q in queries)]
    per_head, num_windows = sources[0].shape[-1] // heads, len(sources)
    channels = torch.arange(heads) * per_head + CHANNEL
    found = torch.cat(found, dim=1)[0, place][:, channels]  # T H; behind them is a state's
    if isinstance(layer, CompressiveLayer):  # which projects windows again as it remembers them
        sources = sources + others[2::2]
    rows = []
    for output in found:
        grads = torch.autograd.grad(output.sum(), sources, retain_graph=True, allow_unused=True)
        grads = [
            torch.zeros_like(source) if grad is None else grad
            for grad, source in zip(grads, sources, strict=True)
        ]
        row = torch.cat(grads[:num_windows], dim=1)[0, place][:, channels]
        if len(grads) > num_windows:
            again = torch.cat(grads[num_windows:], dim=1)[0][:, channels]
            row[: len(again)] += again
        rows.append(row.T)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("name", SYSTEMS)
def test_maps_are_derivatives_of_what_was_attended_to(name):
    model, ids = build(name).double(), draw(1, DOCUMENT)
    lists = [record(layer) for layer in model.model.layers]
    maps = model(ids, output_attentions=True, use_cache=False).attentions
    window = torch.arange(DOCUMENT) // WINDOW
    for layer, found, lists_of_layer in zip(model.model.layers, maps, lists, strict=True):
        wanted = derivative(layer, *lists_of_layer)
        if isinstance(layer, (MelodiLayer, ElasticMemoryLayer)):
            # Windows before are seen through memories, which are not shown.
            wanted = wanted * (window[:, None] == window)
        if isinstance(layer, LongTermMelodiLayer):  # whose gate is not part of the weights
            wanted = wanted / layer.gate[:, CHANNEL].sigmoid()[:, None, None]
        assert wanted.max() > 0.1
        assert_near(found[0], wanted)
