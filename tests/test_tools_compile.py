"""torch.compile and torch.export take the whole model, without a break.

`backend="eager"` runs what was captured as it stands: whether the graph is whole and right does not
depend on the code that a compiler makes of it, which would take minutes for each test.
"""

import pytest
import torch

from .models import EACH, WINDOW, assert_near, build, draw

SMALL = {"num_hidden_layers": 2}
LENGTH = WINDOW + 3


@pytest.fixture(autouse=True)
def forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small(name):
    return build(name, **SMALL)


def compiled(model, backend="eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


def padding(ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


def test_forward():
    model, ids = small("melodi"), draw(2, LENGTH)
    fast = compiled(model)
    with torch.no_grad():
        for texts in (ids, draw(2, LENGTH)):
            assert_near(fast(texts).logits, model(texts).logits)


@pytest.mark.parametrize("name", EACH)
def test_forward_with_padding(name):
    model, ids = small(name), draw(2, LENGTH)
    fast, mask = compiled(model), padding(ids)
    how = {"use_cache": False}
    with torch.no_grad():
        found = fast(ids, attention_mask=mask, **how).logits
        assert_near(found[mask == 1], model(ids, attention_mask=mask, **how).logits[mask == 1])
        alone = model(ids[:1, 3:], **how).logits
    assert_near(found[:1, 3:], alone)


@pytest.mark.parametrize("name", EACH)
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


@pytest.mark.parametrize("name", EACH)
def test_export(name):
    """Of a batch size that is open."""
    model, ids = small(name), draw(2, LENGTH)
    sizes = {"input_ids": {0: torch.export.Dim("batch", max=64)}, "use_cache": None}
    given = {"input_ids": ids, "use_cache": False}
    program = torch.export.export(model, (), given, dynamic_shapes=sizes)
    for rows in (2, 5):
        texts = draw(rows, LENGTH)
        assert_near(program.module()(input_ids=texts, use_cache=False).logits, model(texts).logits)


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
