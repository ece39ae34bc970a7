"""What a memory cannot do is refused, with a word on what to do instead."""

import pytest
import torch
from torch import nn
from transformers import DataCollatorWithFlattening

from .cases import every_case
from .models import DOCUMENT, assert_near, build, draw


def test_copies_of_data_parallel(monkeypatch):
    """Without a GPU nn.DataParallel makes no copies; here it makes two, on the CPU."""
    module = torch.nn.parallel.replicate
    weights = lambda tensors, devices, detach=False: [list(tensors) for _ in devices]  # noqa: E731
    monkeypatch.setitem(module.__globals__, "_broadcast_coalesced_reshape", weights)
    assert len(module(nn.Linear(2, 2), [0, 1])) == 2, "others can be copied"
    with pytest.raises(ValueError, match=r"nn\.DataParallel.*torchrun"):
        module(build("melodi"), [0, 1])


def test_one_device_of_data_parallel_is_no_copy():
    model, ids = build("melodi"), draw(2, DOCUMENT)
    assert_near(nn.DataParallel(model)(ids).logits, model(ids).logits, atol=0)


def test_continuous_batching():
    with pytest.raises(ValueError, match=r"continuous batching.*generate\(\)"):
        build("melodi").generate_batch([draw(9).tolist(), draw(5).tolist()], max_new_tokens=3)


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_quantised_cache(backend):
    how = {"cache_implementation": "quantized", "cache_config": {"backend": backend}}
    with pytest.raises(ValueError, match="only supported for models with only full attention"):
        build("melodi").generate(draw(2, DOCUMENT), max_new_tokens=3, **how)


FLATTENED = {
    "position_ids": {},
    "lengths": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "numbers": {"return_position_ids": False, "return_seq_idx": True},
}


@every_case("how", FLATTENED.values(), ids=FLATTENED)
@every_case("lengths", [(9, 5), (1, 1, 4)])
def test_documents_in_one_row(how, lengths):
    model = build("melodi")
    documents = [{"input_ids": draw(length).tolist()} for length in lengths]
    collate = DataCollatorWithFlattening(return_tensors="pt", **how)
    assert model(**collate(documents[-1:])).loss > 0, "one document is none too many"
    with pytest.raises(ValueError, match="packing=False"):
        model(**collate(documents))


def test_padded_position_ids_are_not_documents():
    model, ids = build("melodi"), draw(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    for filler in (0, 1):
        position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, filler)
        found = model(ids, attention_mask=mask, position_ids=position_ids).logits
        assert_near(found, model(ids, attention_mask=mask).logits, atol=0)
