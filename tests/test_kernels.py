"""What is written by hand equals what torch composes, in its values and in every gradient."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from melodi_hf.models import kernels
from melodi_hf.models.kernels import (
    CrossEntropy,
    LinearCrossEntropy,
    Normalise,
    RecomputedAttention,
)
from melodi_hf.models.loss import causal_lm_loss, loss_without_logits
from melodi_hf.models.modules import (
    MASK_VALUE,
    RMSNorm,
    attend,
    distance_bucket,
    mask_empty_slots,
    merge_empty_slots,
    spread_by_distance,
    unit,
)
from melodi_hf.models.retrieval import Source, attend_to_nearest, attend_to_range

from .cases import every_case
from .models import assert_equal, assert_near


@pytest.fixture
def float64(monkeypatch):
    """What is computed in float32 for accuracy is computed in float64, as gradcheck needs."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def attention_inputs(queries, keys, shape, in_order, dtype=torch.float64):
    """q, k, v and a bias that hides, if `in_order`, what is not strictly before."""
    q, k, v = (torch.randn(2, 2, n, 3, dtype=dtype) for n in (queries, keys, keys))
    bias = torch.randn(*shape, queries, keys, dtype=dtype)
    if in_order:
        place = torch.arange(keys - queries, keys)[:, None]
        bias = bias.masked_fill(torch.arange(keys) >= place, MASK_VALUE)
    return [tensor.requires_grad_() for tensor in (q, k, v, bias)]


def plain_attention(q, k, v, bias):
    return (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v


SHAPES = pytest.mark.parametrize("shape", [(2,), (2, 2), (1, 2), (2, 1)], ids=str)
ORDER = pytest.mark.parametrize("in_order", [False, True], ids=["any order", "in order"])


@SHAPES
@ORDER
@pytest.mark.parametrize(("queries", "keys"), [(4, 7), (5, 5), (1, 3), (1, 1)])
def test_attention_equals_plain_attention(monkeypatch, shape, in_order, queries, keys):
    monkeypatch.setattr(kernels, "QUERY_BLOCK", 2)
    monkeypatch.setattr(kernels, "WEIGHTS_AT_ONCE", 1)  # head by head
    inputs = attention_inputs(queries, keys, shape, in_order)
    found, wanted = RecomputedAttention.apply(*inputs, in_order), plain_attention(*inputs)
    if in_order and queries == keys:  # the first query sees nothing; its callers give it zero
        found, wanted = found[:, :, 1:], wanted[:, :, 1:]
    assert_near(found, wanted, atol=1e-12)
    if not found.numel():
        return
    weight = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((wanted * weight).sum(), inputs),
        strict=True,
    ):
        assert_near(ours, theirs, atol=1e-12)


@SHAPES
@ORDER
def test_attention_has_the_gradient_of_its_values(monkeypatch, shape, in_order):
    monkeypatch.setattr(kernels, "QUERY_BLOCK", 2)
    monkeypatch.setattr(kernels, "WEIGHTS_AT_ONCE", 1)  # head by head
    inputs = attention_inputs(3, 5, shape, in_order=False)
    if in_order:  # what is hidden stays so under small changes
        inputs = attention_inputs(3, 5, shape, in_order=True)
        mask = inputs[3] > MASK_VALUE / 2

        def function(q, k, v, bias):
            return RecomputedAttention.apply(q, k, v, bias.where(mask, MASK_VALUE), True)
    else:

        def function(q, k, v, bias):
            return RecomputedAttention.apply(q, k, v, bias, False)

    assert gradcheck(function, inputs)


@every_case("eager", [False, True])
@every_case("trained", [False, True], ids=["bias given", "bias trained"])
def test_every_way_to_attend_is_the_same(eager, trained):
    q, k, v, bias = attention_inputs(4, 7, (2,), in_order=True, dtype=torch.float32)
    bias = bias.detach().requires_grad_(trained)
    found = attend(q, k, v, bias, in_order=True, eager=eager)
    assert_near(found, plain_attention(q, k, v, bias), atol=1e-6)
    assert_near(attend(q, k, v, eager=eager), plain_attention(q, k, v, 0), atol=1e-6)


@every_case("shape", [None, (5,), (2, 1, 1), (3, 1)], ids=str)
def test_norm_has_the_gradient_of_its_values(shape):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    gain = None if shape is None else torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, gain: Normalise.apply(x, gain, 5, 1e-3), (x, gain))


def test_norm_equals_that_of_torch():
    norm = RMSNorm(6, eps=1e-3).double()
    norm.weight.data.normal_()
    x = (0.1 * torch.randn(2, 3, 6, dtype=torch.float64)).requires_grad_()
    found = norm(x)
    wanted = functional.rms_norm(x, (6,), norm.weight, eps=1e-3)
    assert_near(found, wanted, atol=1e-14)
    weight = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), (x, norm.weight)),
        torch.autograd.grad((wanted * weight).sum(), (x, norm.weight)),
        strict=True,
    ):
        assert_near(ours, theirs, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unit_vectors(dtype):
    x = torch.randn(4, 6).to(dtype)
    x[0] = 0
    found = unit(x, 1e-6)
    assert found.dtype == dtype
    assert_equal(found[0], torch.zeros(6, dtype=dtype))  # no NaN, no length
    assert_near(found[1:].float(), functional.normalize(x[1:].float(), dim=-1), atol=8e-3)
    assert_near(found[1:].float().norm(dim=-1), torch.ones(3), atol=8e-3)
    gain = torch.tensor([[2.0], [3.0], [5.0], [7.0]])
    scaled = unit(x, 1e-6, gain)
    assert scaled.dtype == dtype
    assert_near(scaled.float(), found.float() * gain, atol=8e-3 * 7)
    with torch.no_grad():
        assert_equal(unit(x, 1e-6, gain), scaled)


@pytest.mark.parametrize("chunk", [1, 14, 1 << 20], ids=["a row", "two rows", "all"])
@pytest.mark.usefixtures("float64")
def test_cross_entropy_has_the_gradient_of_its_values(monkeypatch, chunk):
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([3, -100, 0, 6, 3])
    assert gradcheck(lambda logits: CrossEntropy.apply(logits, target, -100), (logits,))
    wanted = functional.cross_entropy(logits, target, reduction="sum")
    assert_near(CrossEntropy.apply(logits, target, -100), wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_equals_that_of_torch_in_float32(dtype):
    logits = (5 * torch.randn(2, 6, 9)).to(dtype).requires_grad_()
    labels = torch.randint(9, (2, 6))
    labels[1, 3] = -100
    found = causal_lm_loss(logits, labels, 9)
    target = functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    wanted = functional.cross_entropy(logits.float().flatten(0, 1), target)
    assert found.dtype == torch.float32
    assert_near(found, wanted, atol=1e-6)
    (ours,), (theirs,) = torch.autograd.grad(found, logits), torch.autograd.grad(wanted, logits)
    assert ours.dtype == dtype
    assert_near(ours.float(), theirs.float(), atol=1e-6)


@every_case("hides", [False, True], ids=["attended to", "hidden"])
@every_case("filled", [[0, 0], [0, 3], [5, 2], [6, 7], [7, 7]], ids=str)
def test_empty_slots_are_attended_to_as_one(hides, filled):
    """Zeros are what the oldest slots of a memory hold that is not full."""
    filled = torch.tensor(filled)
    q, k, v = (torch.randn(2, 2, n, 3, dtype=torch.float64) for n in (4, 7, 7))
    is_filled = (torch.arange(7) >= 7 - filled[:, None])[:, None, :, None]
    k, v = k * is_filled, v * is_filled
    keys, values, bias = merge_empty_slots(k, v, filled, hides)
    assert keys.shape[2] == min(7, int(filled.max()) + 1)
    if hides:
        bias = mask_empty_slots(bias, keys.shape[2], filled)
        wanted = attend(q, k, v, mask_empty_slots(None, 7, filled))
    else:
        wanted = attend(q, k, v)
    seeing = filled > 0 if hides else filled >= 0  # what sees nothing is zero by its caller's hand
    assert_near(attend(q, keys, values, bias)[seeing], wanted[seeing], atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 14, 1 << 20], ids=["a row", "two rows", "all"])
@pytest.mark.usefixtures("float64")
def test_loss_without_logits_has_the_gradient_of_its_values(monkeypatch, chunk):
    monkeypatch.setattr(kernels, "CHUNK_OF_PRODUCTS", chunk)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([3, -100, 0, 6, 3])

    def found(*given):
        return LinearCrossEntropy.apply(*given, target, -100)

    assert gradcheck(found, (hidden, weight))
    assert gradcheck(lambda hidden: found(hidden, weight.detach()), (hidden,))
    assert gradcheck(lambda weight: found(hidden.detach(), weight), (weight,))
    wanted = functional.cross_entropy(hidden @ weight.T, target, reduction="sum")
    assert_near(found(hidden, weight), wanted, atol=1e-12)


def test_loss_without_logits_never_holds_them():
    """The largest tensor that is made while a loss of 1000 rows and 500 words is computed."""
    hidden = torch.randn(1000, 8, requires_grad=True)
    weight, target = torch.randn(500, 8, requires_grad=True), torch.randint(500, (1000,))
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            sizes.append(made.numel() if isinstance(made, torch.Tensor) else 0)
            return made

    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(kernels, "CHUNK_OF_PRODUCTS", 10_000)
        LinearCrossEntropy.apply(hidden, weight, target, -100).backward()
    assert max(sizes) == 20 * 500


def test_a_loss_that_nobody_differentiates_costs_no_gradient(monkeypatch):
    hidden, target = torch.randn(1, 50, 8), torch.randint(20, (1, 50))
    weight = torch.randn(20, 8, requires_grad=True)
    products = []
    monkeypatch.setattr(kernels, "add_product", lambda *given: products.append(given))
    wanted = loss_without_logits(hidden, weight, target)
    assert products
    products.clear()
    with torch.no_grad():
        assert_near(loss_without_logits(hidden, weight, target), wanted, atol=1e-6)
    assert not products


class Casts(TorchDispatchMode):
    """How often a tensor of a shape was made in bfloat16."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and made.dtype == torch.bfloat16:
            self.count += sorted(made.shape) == sorted(self.shape)
        return made


def test_loss_without_logits_brings_the_head_to_the_precision_of_autocast_once(monkeypatch):
    """However many parts it is computed in; the numbers are those of autocast."""
    monkeypatch.setattr(kernels, "CHUNK_OF_PRODUCTS", 10 * 50)
    hidden, weight = torch.randn(100, 6).requires_grad_(), torch.randn(50, 6).requires_grad_()
    target = torch.randint(50, (100,))
    with torch.autocast("cpu", torch.bfloat16), Casts(weight.shape) as casts:
        found = LinearCrossEntropy.apply(hidden, weight, target, -100)
        found.backward()
    assert casts.count == 1
    ours = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        logits = hidden @ weight.T
    plain = functional.cross_entropy(logits.float(), target, reduction="sum")
    plain.backward()
    assert_near(found / len(target), plain / len(target))
    for lean, exact in zip(ours, (hidden.grad, weight.grad), strict=True):
        assert_near(lean, exact, atol=0.01 * exact.abs().max().item())


def test_loss_of_large_logits_is_finite():
    logits = torch.tensor([[[1e4, 0.0], [0.0, -1e4]]], requires_grad=True)
    found = causal_lm_loss(logits, None, 2, shift_labels=torch.tensor([[1, 0]]))
    found.backward()
    assert_equal(found.detach(), torch.tensor(5e3))
    assert_equal(logits.grad, torch.tensor([[[0.5, -0.5], [0.0, 0.0]]]))


@every_case(("queries", "keys"), [(1, 1), (1, 4), (4, 1), (3, 5), (5, 3), (4, 4)])
def test_spread_by_distance_equals_a_loop(queries, keys):
    values = torch.randn(2, queries + keys - 1, dtype=torch.float64, requires_grad=True)
    found = spread_by_distance(values, queries, keys)
    wanted = torch.stack(
        [
            torch.stack([values[:, queries - 1 - i + j] for j in range(keys)], dim=-1)
            for i in range(queries)
        ],
        dim=-2,
    )
    assert_equal(found, wanted)
    assert gradcheck(lambda values: spread_by_distance(values, queries, keys), (values,))


def test_distance_buckets():
    """The first distance of each bucket of T5's table of 32 up to 128."""
    first = [*range(17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    distance = torch.arange(-3, 2000)
    bucket = distance_bucket(distance, 32, 128)
    wanted = torch.bucketize(distance, torch.tensor(first), right=True) - 1
    assert_equal(bucket, wanted.clamp(min=0))
    assert bucket.max() == 31


def rms_norm(x, gain):
    norm = RMSNorm(5, eps=1e-3).double()
    return torch.func.functional_call(norm, {"weight": gain}, (x,))


def attention_in_order(q, k, v, bias):
    place = torch.arange(2, 5)[:, None]
    return attend(q, k, v, bias.where(torch.arange(5) < place, MASK_VALUE), in_order=True)


START = torch.zeros(2, dtype=torch.long)
LOW, HIGH = torch.tensor([[0], [2]]), torch.tensor([[2, 3, 4]]).expand(2, -1)
NEAREST = torch.tensor([0, 3, -1]).expand(2, 2, 3, -1)
TARGET = torch.tensor([[3, -100, 0, 6, 3]])
KEYS = torch.linspace(-1, 1, 80, dtype=torch.float64).view(2, 2, 5, 4)
FUNCTIONS = {  # and the shapes of what they are given
    "attention": (attend, [(2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), (2, 3, 5)]),
    "attention in order": (
        attention_in_order,
        [(2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), (2, 3, 5)],
    ),
    "norm": (rms_norm, [(2, 3, 5), (5,)]),
    "unit": (lambda x, gain: unit(x, 1e-3, gain), [(2, 3, 5), (3, 1)]),
    "unit without gain": (lambda x: unit(x, 1e-3), [(2, 3, 5)]),
    "loss": (lambda logits: causal_lm_loss(logits, None, 7, shift_labels=TARGET), [(1, 5, 7)]),
    "loss without logits": (
        lambda hidden, weight: loss_without_logits(hidden, weight, TARGET),
        [(1, 5, 4), (7, 4)],
    ),
    "places": (
        lambda q, k, v: tuple(attend_to_range(q, [Source(k, v, START)], LOW, HIGH)),
        [(2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)],
    ),
    "nearest": (
        lambda q: tuple(attend_to_nearest(q, [Source(KEYS, KEYS.exp(), START)], NEAREST)),
        [(2, 2, 3, 4)],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's forward mode
@pytest.mark.usefixtures("float64")
def test_every_derivative(name, monkeypatch):
    """Backward, forward mode, many gradients at once, and gradients of gradients."""
    monkeypatch.setattr(kernels, "QUERY_BLOCK", 2)
    function, shapes = FUNCTIONS[name]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_batched_grad=True)


def test_a_gradient_of_a_gradient_knows_what_inputs_share():
    """An input that is made from another one counts once."""
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def function(x):
        return Normalise.apply(x, x.square().mean(-1, keepdim=True)[0], 5, 1e-3)

    assert gradgradcheck(function, (x,))
