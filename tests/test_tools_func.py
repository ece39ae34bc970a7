"""torch.func, forward-mode differentiation, and gradients of gradients, as of any model."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

from melodi_hf.models import faiss_search

from .models import DOCUMENT, EACH, FEW, WINDOW, assert_near, build, draw

# All systems, and what chooses other kernels: empty slots hidden, other gates and retrievals.
MODELS = [*EACH, "melodi_masked", "block_recurrent_two", "memorizing_transformer_side"]


# Of torch's own rules for forward mode, which it makes at their first use.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """What is computed in float32 for accuracy is computed in float64, as these models are."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def double(name, **changes):
    """In training mode, where the compressive transformer has a loss of its own; nothing drops."""
    return build(name, attn_implementation="eager", **changes).double().train()


def weights_of(model):
    return {name: weight.detach() for name, weight in model.named_parameters()}


def loss_of(model, **how):
    """The loss as a function of weights and ids, B T."""

    def loss(weights, ids, attention_mask=None):
        given = {"labels": ids, "attention_mask": attention_mask, **how}
        return functional_call(model, weights, (ids,), given).loss

    return loss


def gradients(model, ids, **how):
    """Those of backward, zeros where there is none."""
    model.zero_grad()
    model(ids, labels=ids, **how).loss.backward()
    named = model.named_parameters()
    return {k: torch.zeros_like(w) if w.grad is None else w.grad for k, w in named}


def tangents(weights):
    return {name: torch.randn_like(weight) for name, weight in weights.items()}


def inner(these, those):
    return sum((these[name] * those[name]).sum() for name in these)


def assert_all_near(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_near(found[name], tensor, atol=1e-8)


def padding(ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, -WINDOW - 1 :] = 0
    return mask


@pytest.mark.parametrize(
    ("name", "is_padded"),
    [*((name, True) for name in MODELS), *((name, False) for name in FEW)],
)
def test_gradients_of_each_sample(name, is_padded):
    """`grad` of a batch, and `vmap` over it: what backward gives for each row alone."""
    model, ids = double(name), draw(2, DOCUMENT)
    mask = padding(ids) if is_padded else torch.ones_like(ids)
    weights, loss = weights_of(model), loss_of(model)
    assert_all_near(grad(loss)(weights, ids, mask), gradients(model, ids, attention_mask=mask))
    given = mask[:, None] if is_padded else None
    over = (None, 0, 0 if is_padded else None)
    each = vmap(grad(loss), in_dims=over)(weights, ids[:, None], given)
    for row in (0, 1):
        alone = slice(row, row + 1)
        wanted = gradients(model, ids[alone], attention_mask=mask[alone])
        assert_all_near({name: tensor[row] for name, tensor in each.items()}, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_forward_mode_agrees_with_backward(name):
    """Along a direction, by `jvp` and by dual numbers; both stop where a memory has no gradient."""
    model, ids = double(name), draw(2, DOCUMENT)
    weights, loss = weights_of(model), loss_of(model)
    along = tangents(weights)
    wanted = inner(gradients(model, ids), along)
    found = jvp(lambda weights: loss(weights, ids), (weights,), (along,))[1]
    assert_near(found, wanted, atol=1e-8)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(w, along[name]) for name, w in weights.items()}
        found = forward_ad.unpack_dual(loss(dual, ids)).tangent
    assert_near(found, wanted, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "skip_logits"), [*((name, True) for name in MODELS), ("melodi", False)]
)
def test_gradients_of_gradients(name, skip_logits):
    """A gradient penalty by double backward equals forward over reverse in `torch.func`."""
    model, ids = double(name), draw(2, DOCUMENT)
    weights, loss = weights_of(model), loss_of(model)
    along = tangents(weights)
    first = model(ids, labels=ids, skip_logits=skip_logits).loss
    named = dict(model.named_parameters())
    found = torch.autograd.grad(first, named.values(), create_graph=True, allow_unused=True)
    pairs = zip(named.items(), found, strict=True)
    found = {name: torch.zeros_like(w) if g is None else g for (name, w), g in pairs}
    assert_all_near(found, gradients(model, ids))
    second = torch.autograd.grad(
        inner(found, along), named.values(), allow_unused=True, materialize_grads=True
    )
    wanted = jvp(lambda weights: grad(loss)(weights, ids), (weights,), (along,))[1]
    assert_all_near(dict(zip(named, second, strict=True)), wanted)


@pytest.mark.parametrize("name", FEW)
def test_jacobians(name):
    """By `jacrev`, and by backward of many gradients at once, row by row the same."""
    model, ids = double(name), draw(2, DOCUMENT)
    weights, at = weights_of(model), "model.layers.0.self_attn.k_proj.weight"

    def last(weight):
        logits = functional_call(model, weights | {at: weight}, (ids,)).logits
        return logits[0, -1, :4]

    wanted = torch.autograd.functional.jacobian(last, weights[at])
    assert wanted.abs().max() > 1e-4
    assert_near(jacrev(last)(weights[at]), wanted, atol=1e-8)
    found = torch.autograd.functional.jacobian(last, weights[at], vectorize=True)
    assert_near(found, wanted, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_several_models_and_texts_at_once(name):
    """`vmap` over weights and texts, in two calls that share a cache."""
    model, ids = double(name), draw(3, DOCUMENT)
    weights = weights_of(model)
    several = {k: torch.stack((w, 1.1 * w, 0.9 * w)) for k, w in weights.items()}

    def logits(weights, ids):
        output = functional_call(model, weights, (ids[:, :-1],))
        cache = output.cache
        last = functional_call(model, weights, (ids[:, -1:],), {"cache": cache})
        return torch.cat((output.logits, last.logits), dim=1)

    with torch.no_grad():
        found = vmap(logits)(several, ids[:, None])
        for i in range(3):
            one = {name: weight[i] for name, weight in several.items()}
            wanted = functional_call(model, one, (ids[i : i + 1],)).logits
            assert_near(found[i], wanted, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_memory_of_each_sample(name):
    """`vmap` over what segments of training carry, for rows that stand at different places."""
    model, ids = double(name), draw(2, DOCUMENT)
    mask = padding(ids)
    with torch.no_grad():
        memory = model(ids, attention_mask=mask, return_memory=True).memory
        wanted = model(ids, memory=memory).logits
        tensors, spec = torch.utils._pytree.tree_flatten(memory)
        each = [t[:, None] if isinstance(t, torch.Tensor) else t for t in tensors]

        def logits(ids, *tensors):
            memory = torch.utils._pytree.tree_unflatten(tensors, spec)
            return model(ids, memory=memory).logits

        over = tuple(0 if isinstance(t, torch.Tensor) else None for t in tensors)
        found = vmap(logits, in_dims=(0, *over))(ids[:, None], *each)
    assert_near(found[:, 0], wanted, atol=1e-8)


def test_nothing_of_a_transform_stays():
    """A model whose first call is transformed, with the attention that it has by default, gives the
    same in the calls after it."""
    model, ids = build("melodi").double(), draw(2, DOCUMENT)
    first = grad(loss_of(model))(weights_of(model), ids)
    wanted = gradients(build("melodi").double(), ids)
    assert_all_near(first, wanted)
    assert_all_near(gradients(model, ids), wanted)


@pytest.mark.skipif(faiss_search.faiss is None, reason="faiss is not installed")
def test_an_index_of_faiss_is_refused():
    model, ids = double("memorizing_transformer", faiss_index="Flat"), draw(2, DOCUMENT)
    with pytest.raises(ValueError, match=r"torch.func: give faiss_index=None"):
        grad(loss_of(model))(weights_of(model), ids)
