"""Windows read in one loop of XLA's give what they give one by one, with one graph for all."""

import copy

import pytest
import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch.utils._pytree import tree_leaves

from melodi_hf.tpu import plan_loop
from tests.models import WINDOW, assert_near, build, draw

torch_xla.device()  # before anything is differentiated, or autograd does not know it

ROWS, WINDOWS = 2, 3


def on_device(model):
    model = copy.deepcopy(model).to("xla")
    model.tie_weights()  # moving tears them apart
    model.base_model.plan_windows = plan_loop
    return model


def read_two_segments(model, ids):
    """Train on two segments, between which one row begins a new document: the losses, the
    gradients by name, the memory."""
    memory, losses = model.base_model.empty_memory(ROWS), []
    for segment, is_reset in zip(ids.split(WINDOWS * WINDOW, dim=1), (False, True), strict=True):
        reset = torch.tensor([False, is_reset]).to(model.device)
        ids = segment.to(model.device)
        out = model(ids, shift_labels=ids, memory=memory, reset_memory=reset, return_memory=True)
        out.loss.backward()
        losses.append(out.loss.detach())
        memory = out.memory
    torch_xla.sync()  # one graph, in place of one for each tensor that is looked at
    gradients = {
        name: weight.grad.cpu()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }
    tensors = [leaf.cpu() for leaf in tree_leaves(memory) if torch.is_tensor(leaf)]
    return torch.stack(losses).cpu(), gradients, tensors


@pytest.mark.parametrize("name", ["melodi_masked", "melodi_no_short", "transformer_xl"])
def test_loop_gives_losses_gradients_and_memory_of_windows_one_by_one(name):
    model = build(name).train()
    ids = draw(ROWS, 2 * WINDOWS * WINDOW)
    found = read_two_segments(on_device(model), ids)
    wanted = read_two_segments(model, ids)
    assert_near(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    # A mixer whose outcome no one reads, as in the last layer, has none.
    assert sum(gradient.any() for gradient in wanted[1].values()) > 0.8 * len(wanted[1])
    for parameter, gradient in wanted[1].items():
        assert_near(found[1][parameter], gradient, atol=1e-5 * (1 + gradient.abs().max()))
    assert len(found[2]) == len(wanted[2])
    for one, other in zip(found[2], wanted[2], strict=True):
        assert_near(one, other)


def test_backward_draws_the_dropout_of_forward():
    """Seen from outside: the loss changes along its gradient as fast as the gradient is long."""
    model = on_device(build("melodi", dropout=0.3, attention_dropout=0.3)).train()
    ids, memory = draw(ROWS, WINDOWS * WINDOW).to("xla"), model.base_model.empty_memory(ROWS)

    def loss():
        xm.set_rng_state(5)
        return model(ids, shift_labels=ids, memory=memory, return_memory=True).loss

    loss().backward()
    weight, step = model.model.layers[0].self_attn.o_proj.weight, 1e-2
    direction = weight.grad / weight.grad.norm()
    slope, ends = weight.grad.norm(), []
    with torch.no_grad():
        for way in (step, -2 * step):
            weight.add_(direction, alpha=way)
            ends.append(loss())
    measured = (ends[0] - ends[1]) / (2 * step)
    torch_xla.sync()
    torch.testing.assert_close(measured.cpu(), slope.cpu(), rtol=0.03, atol=0)


def graph_of_a_step(model, windows):
    """The operations of a step's graph, as XLA is given them."""
    model.zero_grad()
    ids = torch.ones(ROWS, windows * WINDOW, dtype=torch.long).to("xla")
    memory = model.base_model.empty_memory(ROWS)
    torch_xla.sync()
    loss = model(ids, shift_labels=ids, memory=memory, return_memory=True).loss
    loss.backward()
    made = [weight.grad for weight in model.parameters() if weight.grad is not None]
    count = torch_xla._XLAC._get_xla_tensors_hlo([loss, *made]).count(" = ")
    for tensor in (loss, *made):  # never computed
        tensor.detach_()
    return count


@pytest.mark.parametrize("name", ["melodi", "transformer_xl"])
def test_graph_is_as_large_for_64_windows_as_for_8(name):
    model = on_device(build(name)).train()
    sizes = [graph_of_a_step(model, windows) for windows in (8, 16, 64)]
    assert sizes[0] == sizes[1] == sizes[2]


def test_attentions_of_a_loop_are_refused():
    model = on_device(build("melodi"))
    with pytest.raises(ValueError, match="output_attentions=True is not supported"):
        model(draw(ROWS, WINDOWS * WINDOW).to("xla"), use_cache=False, output_attentions=True)
