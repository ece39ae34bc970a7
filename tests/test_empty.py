"""Batches of no rows are refused, and no layer is given a tensor without numbers."""

import pytest
import torch
from torch import nn

from .models import DOCUMENT, FEW, SYSTEMS, VOCABULARY, WINDOW, assert_equal, build, draw

NO_ROWS = r"the batch has 0 rows: give at least 1|input_ids are \(0, 9\)"


def test_batches_of_no_rows():
    model, ids = build("melodi"), torch.zeros(0, WINDOW + 1, dtype=torch.long)
    embedded = torch.zeros(0, WINDOW + 1, model.config.hidden_size)
    calls = [
        lambda: model(ids),
        lambda: model(ids, use_cache=False),
        lambda: model(ids, attention_mask=torch.ones_like(ids)),
        lambda: model(ids, return_memory=True),
        lambda: model.model(ids),
        lambda: model(inputs_embeds=embedded),
        lambda: model.train()(ids, labels=ids),
        lambda: model(ids, labels=ids, skip_logits=True),
        lambda: model.generate(ids, max_new_tokens=3),
        lambda: model.generate(inputs_embeds=embedded, max_new_tokens=3),
        lambda: model.eval()(ids, use_cache=True),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=NO_ROWS):
            call()


def refuse_empty(module, given):
    assert all(x.numel() for x in given if isinstance(x, torch.Tensor)), type(module).__name__


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_layer_is_given_an_empty_tensor(name):
    """In training, generation, rows with padding, and calls of every length."""
    model, ids = build(name), draw(2, DOCUMENT)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(refuse_empty)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    model(ids, labels=ids, return_memory=True).loss.backward()
    model(ids, attention_mask=mask)
    model.generate(ids[:, : WINDOW - 2], max_new_tokens=WINDOW + 3, do_sample=False)
    model.generate(ids[:, :7], attention_mask=mask[:, :7], max_new_tokens=WINDOW, do_sample=False)


@pytest.mark.parametrize("name", FEW)
def test_dynamic_int8(name):
    """torchao's linear layers with activations in int8, which refuse an empty tensor."""
    pytest.importorskip("torchao", minversion="0.18")  # 0.17 warns of its own layout
    torchao = pytest.importorskip("torchao.quantization")
    model, ids = build(name), draw(2, WINDOW + 3)
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig(version=2))
    found = model.generate(ids, max_new_tokens=WINDOW, do_sample=False)
    assert found.shape == (2, 2 * WINDOW + 3)
    assert found.max() < VOCABULARY
    assert_equal(found, model.generate(ids, max_new_tokens=WINDOW, do_sample=False))
