"""The mathematics of Elastic Memory: banks that are exact, contract, and are made once."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import legendre

from melodi_hf.models import legs

from .cases import every_case
from .models import assert_differ, assert_equal, assert_near

SEVEN = legs.gauss_legendre_nodes(7)


def generator(order):
    """A and B of the differential equation c' = (A c + B f) / t (arXiv 2008.07669, theorem 2)."""
    n = torch.arange(order, dtype=torch.float64)
    a = -torch.sqrt(torch.outer(2 * n + 1, 2 * n + 1)).tril(-1) - torch.diag(n + 1)
    return a, torch.sqrt(2 * n + 1)


def evaluate(x, order):
    """√(2n+1) P_n(2x - 1) by numpy's recurrence: ... -> ... N."""
    values = legendre.legvander(2 * np.asarray(x) - 1, order - 1)
    return torch.from_numpy(values * np.sqrt(2 * np.arange(order) + 1))


def project(signal, order):
    """T D, a piece of width 1/T each -> N D, by quadrature of every polynomial on every piece."""
    nodes, weights = legendre.leggauss(order // 2 + 2)
    length = len(signal)
    x = (np.arange(length)[:, None] + (nodes + 1) / 2) / length  # T nodes
    integrals = (evaluate(x, order) * torch.from_numpy(weights)[:, None]).sum(1) / (2 * length)
    return integrals.T @ signal


def transition(tokens_read, length, order):
    return legs.transition(torch.tensor(tokens_read), length, legs.gauss_legendre_nodes(order))


def recur(signal, order, block):
    coefficients = signal.new_zeros(order, signal.shape[1])
    for i, piece in enumerate(signal.split(block)):
        past, new = transition(i * block, block, order)
        coefficients = past @ coefficients + new @ piece
    return coefficients


@every_case("order", [1, 2, 7, 64, 540])
def test_nodes_integrate_products_of_the_polynomials_exactly(order):
    nodes = legs.gauss_legendre_nodes(order)
    unit = torch.eye(order, dtype=torch.float64)
    assert_near(nodes.basis.T @ (nodes.weight[:, None] * nodes.basis), unit, atol=2e-14)
    assert_near(nodes.basis, evaluate(nodes.x, order), atol=1e-8)  # near 1 theirs loses digits


@every_case("order", [1, 7, 64, 540])
@every_case(("read", "length"), [(1, 1), (4, 4), (2048, 2048), (6, 512)])
def test_past_is_the_matrix_exponential(order, read, length):
    """Of A ln(t1 / t0); torch's own is 3e-12 off on the diagonal, which is known."""
    past = transition(read, length, order).past
    a, _ = generator(order)
    assert_near(past, torch.linalg.matrix_exp(a * math.log((read + length) / read)), atol=3e-11)
    powers = (read / (read + length)) ** (torch.arange(order) + 1.0).double()
    assert_near(past.diag(), powers, atol=1e-13)
    assert_near(past.triu(1), torch.zeros_like(past), atol=1e-13)


@every_case("order", [1, 7, 64, 540])
def test_steps_can_be_taken_at_once(order):
    (first, a), (second, b) = (transition(read, length, order) for read, length in ((6, 2), (8, 3)))
    past, block = transition(6, 5, order)
    assert_near(second @ first, past, atol=1e-13)
    assert_near(torch.cat((second @ a, b), dim=1), block, atol=1e-13)


@every_case("order", [7, 64])
@every_case("read", [1, 6, 80])
def test_a_block_of_one_token_is_the_zero_order_hold(order, read):
    """A⁻¹ (e^{A ln(k / (k-1))} - 1) B."""
    past, block = transition(read, 1, order)
    a, b = generator(order)
    wanted = torch.linalg.solve(a, (past - torch.eye(order)) @ b)
    assert_near(block[:, 0], wanted, atol=1e-13)


@every_case(("order", "block"), [(7, 32), (64, 96), (540, 12)])
def test_block_after_block_equals_projecting_the_whole_past(order, block):
    """Also where there are more coefficients than tokens."""
    torch.manual_seed(0)
    signal = torch.randn(6 * block, 2, dtype=torch.float64)
    assert_near(recur(signal, order, block), project(signal, order), atol=1e-12)
    if order == 7:  # token by token takes time
        assert_near(recur(signal, order, 1), project(signal, order), atol=1e-12)


def test_the_first_block_owes_nothing_to_what_was_held():
    past, block = transition(0, 5, 4)
    assert_equal(past, torch.zeros_like(past))
    assert_near(block.sum(1), torch.tensor([1.0, 0, 0, 0]).double(), atol=1e-15)


@every_case(("order", "tolerance"), [(64, 1e-13), (540, 1e-12)])
@every_case("ratio", [(1, 1), (2048, 2048), (1_000_000, 512)])
def test_what_was_held_never_grows(order, tolerance, ratio):
    """The norm is √(t0 / t1) once there are coefficients enough, and never more."""
    read, length = ratio
    norm = torch.linalg.matrix_norm(transition(read, length, order).past, 2)
    assert float(norm) == pytest.approx(math.sqrt(read / (read + length)), rel=tolerance)
    few = torch.linalg.matrix_norm(transition(read, length, 3).past, 2)
    assert few <= norm + tolerance


def test_rounding_does_not_add_up():
    """In float32, 400 blocks are as near to the projection as few."""
    torch.manual_seed(0)
    signal, order = torch.randn(400 * 8, 4), 64
    coefficients = signal.new_zeros(order, 4)
    for i, piece in enumerate(signal.split(8)):
        past, new = legs.cached_transition(
            i * 8, 8, legs.gauss_legendre_nodes(order), like=coefficients
        )
        coefficients = past @ coefficients + new @ piece
    wanted = project(signal.double(), order)
    assert (coefficients - wanted).norm() < 1e-6 * wanted.norm()


def reconstruction_error(signal, order):
    """Compute the relative error over the whole past from the energy of the coefficients."""
    coefficients = recur(signal, order, len(signal) // 6)
    return float((1 - coefficients.square().sum() / signal.square().mean(0).sum()).sqrt())


@pytest.mark.parametrize(("order", "printed"), [(64, 0.98), (540, 0.83)])
def test_white_noise_cannot_be_held(order, printed):
    """Of T numbers N are kept: the error is about √(1 - N/T)."""
    torch.manual_seed(0)
    noise = torch.randn(1536, 32, dtype=torch.float64)
    assert round(reconstruction_error(noise, order), 2) == printed


def test_a_smooth_signal_is_held():
    """The better, the more coefficients."""
    t = (torch.arange(1536).double() + 0.5) / 1536
    smooth = torch.stack([(2 * math.pi * f * t + f).sin() for f in (1, 3, 8, 12)], dim=1)
    errors = [reconstruction_error(smooth, order) for order in (8, 32, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5
    assert errors[2] < 0.01  # what is left are the steps between tokens
    x = torch.rand(20).double()
    coefficients = legs.basis(x, legs.gauss_legendre_nodes(64)) @ recur(smooth, 64, 256)
    between = torch.stack([(2 * math.pi * f * x + f).sin() for f in (1, 3, 8, 12)], dim=1)
    assert_near(coefficients, between, atol=1e-3)


@every_case("order", [7, 64, 540])
def test_polynomials_between_the_nodes(order):
    nodes = legs.gauss_legendre_nodes(order).x
    x = torch.cat((torch.rand(50).double(), nodes[:3], torch.tensor([0.0, 0.5, 1.0]).double()))
    # A polynomial of degree n turns by n² near its ends: so much is lost to the rounding of x.
    assert_near(
        legs.basis(x, legs.gauss_legendre_nodes(order)), evaluate(x, order), atol=1e-15 * order**2.5
    )


# Points of the past


def test_uniform_points():
    found = legs.uniform(4, torch.tensor([10, 99]))
    assert_equal(found, torch.tensor([[1, 3, 5, 7]] * 2).double() / 8)


@every_case("tokens", [1, 2, 1000, 1_000_000])
def test_exponential_points(tokens):
    """The newest is the middle of the last token, the oldest that of the first, and ages grow by
    one factor."""
    x = legs.exponential(6, torch.tensor(tokens))
    age = (1 - x) * tokens + 0.5
    assert float(x[-1]) == 1 - 0.5 / tokens
    assert float(x[0] * tokens) == pytest.approx(0.5, abs=1e-9)
    assert (age[:-1] / age[1:]).tolist() == pytest.approx([tokens**0.2] * 5, rel=1e-6)
    assert (x > 0).all()
    assert float(legs.exponential(1, torch.tensor(tokens))) == 1 - 0.5 / tokens


# What is kept


def test_banks_are_kept_as_far_as_there_is_room(monkeypatch):
    one = torch.zeros(1)
    cache = legs.LruCache(max_bytes=3 * 4 * (7 * 7 + 7 * 8))  # bytes: three windows in float32
    monkeypatch.setattr(legs, "BANKS", cache)
    banks = [legs.cached_transition(8 * i, 8, SEVEN, like=one) for i in range(2000)]
    assert len(cache.results) == 3
    assert cache.bytes == cache.max_bytes
    assert legs.cached_transition(8 * 1999, 8, SEVEN, like=one) is banks[1999]
    again = legs.cached_transition(8, 8, SEVEN, like=one)  # was given up
    assert again is not banks[1]
    assert_equal(again.past, banks[1].past)
    assert_differ(again.past, banks[2].past)


def test_banks_made_in_inference_mode_serve_training(monkeypatch):
    monkeypatch.setattr(legs, "BANKS", legs.LruCache(legs.CACHE_BYTES))
    coefficients = torch.zeros(7, 2, requires_grad=True)
    with torch.inference_mode():
        legs.cached_transition(8, 8, SEVEN, like=coefficients)
        legs.cached_basis(legs.uniform, 3, 8, SEVEN, like=coefficients)
    past, _ = legs.cached_transition(8, 8, SEVEN, like=coefficients)
    (
        legs.cached_basis(legs.uniform, 3, 8, SEVEN, like=coefficients) @ (past @ coefficients)
    ).sum().backward()
    assert coefficients.grad.abs().max() > 0


def test_points_that_do_not_move_have_one_bank(monkeypatch):
    monkeypatch.setattr(legs, "BANKS", legs.LruCache(legs.CACHE_BYTES))
    one = torch.zeros(1)
    for points, banks in ((legs.uniform, 1), (legs.exponential, 1 + 5)):
        for tokens in range(8, 48, 8):
            legs.cached_basis(points, 3, tokens, SEVEN, like=one)
        assert len(legs.BANKS.results) == banks


def test_banks_are_made_where_there_is_float64():
    assert legs.float64_device(torch.device("mps")) == torch.device("cpu")
    assert legs.float64_device(torch.device("cuda:1")) == torch.device("cuda:1")


def test_rows_that_have_read_equally_much_go_together():
    seen = []

    def run(tokens, x, y):
        seen.append((tokens, x.flatten().tolist()))
        return x + tokens, y * tokens

    read, x = torch.tensor([8, 0, 16, 8, 0]), torch.arange(5.0)[:, None]
    found = legs.group_by_position(run, read, x, x)
    assert seen == [(0, [1, 4]), (8, [0, 3]), (16, [2])]
    assert_equal(found[0], x + read[:, None])
    assert_equal(found[1], x * read[:, None])
