"""torch.compile and torch.export take the whole model, without a break.

`backend="eager"` runs what was captured as it stands: whether the graph is whole and right does not
depend on the code that a compiler makes of it, which would take minutes for each test.
"""

import pytest
import torch
from torch.utils._pytree import tree_map

from .models import EACH, FEW, WINDOW, assert_near, build, draw

# One layer, which has all that a layer of its system can have: compiling takes seconds per layer.
SMALL = {
    "melodi": {"long_memory_layers": (0,)},
    "block_recurrent": {"recurrent_layers": (0,)},
    "elastic_memory": {"memory_layers": (0,)},
    "memorizing_transformer_side": {"memory_layer": 0},
}
LENGTH = WINDOW + 3


@pytest.fixture(autouse=True)
def forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small(name):
    return build(name, num_hidden_layers=1, **SMALL.get(name, {}))


def compiled(model, backend="eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


def padding(ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


@pytest.mark.parametrize("name", ["melodi"])
def test_forward_with_padding(name):
    model, ids = small(name), draw(2, LENGTH)
    fast, mask = compiled(model), padding(ids)
    how = {"use_cache": False}
    with torch.no_grad():
        found = fast(ids, attention_mask=mask, **how).logits
        assert_near(found[mask == 1], model(ids, attention_mask=mask, **how).logits[mask == 1])
        alone = model(ids[:1, 3:], **how).logits
    assert_near(found[:1, 3:], alone)


@pytest.mark.parametrize("name", FEW)
def test_training_with_a_carried_memory(name):
    """Loss, gradients and the memory for the next segment; one graph serves all segments."""
    model, ids = small(name).train(), draw(2, 2 * WINDOW)

    def train(run, memory):
        model.zero_grad()
        how = {"labels": ids, "memory": memory, "return_memory": True, "use_cache": False}
        output = run(ids, **how)
        output.loss.backward()
        grads = {k: w.grad for k, w in model.named_parameters() if w.grad is not None}
        return output.loss.detach(), grads, output.memory

    fast, memory = compiled(model), train(model, None)[2]
    for stance in ("default", "fail_on_recompile"):
        wanted = train(model, memory)
        with torch.compiler.set_stance(stance):
            found = train(fast, memory)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert len(found[1]) > 10
        memory = found[2]


BATCH = torch.export.Dim("batch", max=64)


def export(model, given, sizes):
    """A program of what is given by name; sizes: name -> the axes that are open."""
    open_axes = {name: sizes.get(name) for name in given}
    return torch.export.export(model, (), given, dynamic_shapes=open_axes).module()


@pytest.mark.parametrize("name", FEW)
def test_export(name):
    """Of a batch size that is open; with padding too, which is placed in code that all share."""
    model, ids, rows = small(name), draw(2, LENGTH), {0: BATCH}
    sizes = {"input_ids": rows, "attention_mask": rows}
    for mask in ({}, {"attention_mask": padding(ids)})[: 2 if name == "melodi" else 1]:
        how = mask | {"use_cache": False}
        program = export(model, {"input_ids": ids} | how, sizes)
        for count in (2, 5):
            texts = draw(count, LENGTH)
            given = how | {name: padding(texts) for name in mask}
            real = padding(texts) == 1 if mask else texts > 0
            found = program(input_ids=texts, **given).logits
            assert_near(found[real], model(texts, **given).logits[real])


@pytest.mark.parametrize(("name", "whole"), [("melodi", 0), *((name, 1) for name in FEW)])
def test_export_of_a_length_that_is_open(name, whole):
    """As long as the number of windows stays the same: more of them are more of a graph."""
    model, first = small(name), whole * WINDOW + 2
    length = torch.export.Dim("length", min=first, max=first + WINDOW - 3)
    sizes = {"input_ids": {0: BATCH, 1: length}}
    given = {"input_ids": draw(2, first + 2), "use_cache": False}
    program = export(model, given, sizes)
    for count in (first, first + WINDOW - 3):
        texts = draw(3, count)
        found = program(input_ids=texts, use_cache=False).logits
        assert_near(found, model(texts).logits)


@pytest.mark.parametrize(
    ("name", "length"), [("melodi", WINDOW), *((name, LENGTH) for name in FEW)]
)
def test_export_with_a_memory(name, length):
    """A program that reads a document of any length, one piece after the other."""
    model, ids = small(name), draw(2, 4 * length)
    pieces = ids.split(length, dim=1)
    how = {"return_memory": True, "use_cache": False}
    memory = model(pieces[0], **how).memory
    sizes = {
        "input_ids": {0: BATCH},
        "memory": tree_map(lambda t: {0: BATCH} if isinstance(t, torch.Tensor) else None, memory),
    }
    program = export(model, {"input_ids": pieces[1], "memory": memory} | how, sizes)
    output = program(input_ids=pieces[1], memory=memory, **how)
    wanted = model(pieces[1], memory=memory, **how)
    assert_near(output.logits, wanted.logits)
    torch.testing.assert_close(output.memory, wanted.memory, rtol=0, atol=1e-5)
    assert len(output.memory.layers[0]._fields) > 1
    if length == WINDOW:  # then all pieces stand at the same slot
        again = program(input_ids=pieces[2], memory=output.memory, **how)
        assert_near(again.logits, model(ids).logits[:, 2 * length : 3 * length])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("name", EACH)
def test_inductor(name):
    """The compiler that users get; minutes on a CPU."""
    model, ids = small(name).train(), draw(2, LENGTH)
    wanted = model(ids, labels=ids, use_cache=False)
    found = compiled(model, backend="inductor")(ids, labels=ids, use_cache=False)
    assert_near(found.logits, wanted.logits)
    found.loss.backward()
