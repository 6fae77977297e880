"""Paths, solution functions, the quotient's coefficients, schedules and the assignment of rows."""

import math
from fractions import Fraction

import pytest
import torch

from soflow_fast import paths

TIMES = torch.linspace(0, 1, 21, dtype=torch.float64)


def _float64(values):
    return torch.tensor(values, dtype=torch.float64)


def _derivative(function, at):
    at = at.clone().requires_grad_()
    return torch.autograd.grad(function(at).sum() + 0 * at.sum(), at)[0]


@pytest.mark.parametrize("path", paths.PATHS)
def test_path_runs_from_data_to_noise_and_its_velocity_is_its_derivative(path):
    alpha, beta, dalpha, dbeta = paths.path_coefficients(TIMES, path)
    torch.testing.assert_close(torch.stack([alpha[[0, -1]], beta[[0, -1]]]), torch.eye(2).double(), rtol=0, atol=1e-15)
    expected = {
        "linear": (1 - TIMES, TIMES),
        "trig": (torch.cos(math.pi * TIMES / 2), torch.sin(math.pi * TIMES / 2)),
    }[path]
    torch.testing.assert_close(torch.stack([alpha, beta]), torch.stack(expected), rtol=0, atol=1e-15)
    for i, derivative in ((0, dalpha), (1, dbeta)):
        slope = _derivative(lambda t, i=i: paths.path_coefficients(t, path)[i], TIMES)
        torch.testing.assert_close(derivative, slope, rtol=0, atol=1e-14)


@pytest.mark.parametrize("parameterization", paths.PARAMETERIZATIONS)
def test_solution_coefficients(parameterization):
    t, s = TIMES[:, None].expand(21, 21), TIMES.expand(21, 21)
    a, b = paths.solution_coefficients(t, s, parameterization)
    angle = math.pi / 2 * (s - t)
    expected = {"euler": (torch.ones_like(t), s - t), "trig": (angle.cos(), angle.sin())}[parameterization]
    torch.testing.assert_close(torch.stack([a, b]), torch.stack(expected), rtol=0, atol=1e-15)
    assert torch.equal(
        torch.stack([a.diagonal(), b.diagonal()]), torch.stack([torch.ones(21), torch.zeros(21)]).double()
    )


@pytest.mark.parametrize("parameterization", paths.PARAMETERIZATIONS)
def test_velocity_scale_is_the_derivative_of_b_and_that_of_a_vanishes(parameterization):
    da, db = (
        _derivative(lambda s, i=i: paths.solution_coefficients(TIMES, s, parameterization)[i], TIMES) for i in (0, 1)
    )
    torch.testing.assert_close(da, torch.zeros(21).double(), rtol=0, atol=1e-15)
    scale = {"euler": 1.0, "trig": math.pi / 2}[parameterization]
    assert paths.velocity_scale(parameterization) == scale
    torch.testing.assert_close(db, _float64([scale] * 21), rtol=0, atol=1e-15)


def _quotient(parameterization, t, gap, s, x, F, dF, v):
    """(f(x,t,s) − f(x−gap·v,t−gap,s)) / gap by subtraction."""
    (a, b), (a_l, b_l) = (
        {
            "euler": lambda tau: (1.0, s - tau),
            "trig": lambda tau: (torch.cos(math.pi / 2 * (s - tau)), torch.sin(math.pi / 2 * (s - tau))),
        }[parameterization](tau)
        for tau in (t, t - gap)
    )
    return (a * x + b * F - a_l * (x - gap * v) - b_l * (F + dF)) / gap


@pytest.mark.parametrize("parameterization", paths.PARAMETERIZATIONS)
@pytest.mark.parametrize("gap", [0.3, 1e-2, 1e-5])
def test_quotient_coefficients_are_the_quotient(parameterization, gap):
    t, s, x, F, dF, v = _float64([0.9, 0.2, 0.7, -1.3, 0.4, 2.1])
    dF, gap = dF * gap, _float64(gap)
    c = paths.quotient_coefficients(t, gap, s, parameterization)
    ours = c[0] * x + c[1] * F + c[2] * dF + c[3] * v
    torch.testing.assert_close(ours, _quotient(parameterization, t, gap, s, x, F, dF, v), rtol=1e-14 / gap, atol=0)


@pytest.mark.parametrize("parameterization", paths.PARAMETERIZATIONS)
def test_quotient_coefficients_lose_nothing_in_float32(parameterization):
    t, s = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0)).sort(0, descending=True).values
    for step in (1.0, 1e-2, 1e-4, 1e-7):
        gap = (t - s) * step
        for tangent in (False, True):
            ours = paths.quotient_coefficients(t, gap, s, parameterization, tangent)
            # the factor of dF is (t−s)/gap − 1, of which t−s has the rounding error of t and s
            truth = paths.quotient_coefficients(t.double(), gap.double(), s.double(), parameterization, tangent)
            for i, (value, exact) in enumerate(zip(ours, truth, strict=True)):
                unit = 1 / gap.double() if i == 2 and not tangent else 1.0
                assert ((value.double() - exact).abs() <= 4e-7 * (exact.abs() + unit)).all()


@pytest.mark.parametrize("parameterization", paths.PARAMETERIZATIONS)
def test_tangent_coefficients_are_the_limit_of_the_quotient(parameterization):
    t, s, gap = _float64([0.9, 0.2, 1e-7])
    finite = paths.quotient_coefficients(t, gap, s, parameterization)
    limit = paths.quotient_coefficients(t, gap, s, parameterization, tangent=True)
    # the difference of F is gap times its derivative
    finite = (*finite[:2], finite[2] * gap, finite[3])
    for value, expected in zip(finite, limit, strict=True):
        assert value.item() == pytest.approx(expected.item(), abs=1e-6)


def test_guidance_decay():
    t = _float64([0, 0.5, 0.8, 0.81, 0.9, 0.99, 1])
    expected = [1.0, 1.0, 1.0]
    for time in (0.81, 0.9, 0.99):
        q = (1 - time) / 0.2
        expected.append(1 - math.exp(-0.025 * q / (1 - q)))
    expected.append(0.0)
    torch.testing.assert_close(paths.guidance_decay(t, 0.8), _float64(expected), rtol=1e-12, atol=1e-15)
    # q is cut at 1−1e-6, so that the decay starts without a jump
    just_above = paths.guidance_decay(_float64([0.8 + 1e-9]), 0.8)
    assert just_above.item() == pytest.approx(1, abs=1e-12)
    assert torch.equal(paths.guidance_decay(TIMES, 1.0), torch.ones(21).double())
    assert (paths.guidance_decay(TIMES, 0.3).diff() <= 0).all()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("const", [0.002, 0.002, 0.002, 0.002]),
        ("linear", [0.1, 0.0755, 0.051, 0.002]),
        ("cosine", [0.1, 0.002 + 0.098 * (1 + math.sqrt(0.5)) / 2, 0.051, 0.002]),
        ("exponential", [0.1, 0.1 * 0.02**0.25, 0.1 * 0.02**0.5, 0.002]),
    ],
)
def test_gap_ratio(schedule, expected):
    for k, r in zip((0.0, 0.25, 0.5, 1.0), expected, strict=True):
        assert paths.gap_ratio(k, schedule, 0.1, 0.002).item() == pytest.approx(r, abs=1e-8)
        on_device = paths.gap_ratio(_float64(k), schedule, 0.1, 0.002)
        assert on_device.dtype == torch.float64
        assert on_device.item() == pytest.approx(r, rel=1e-13)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda t: paths.path_coefficients(t, "Linear"), "path='Linear' is not known; choose one of linear, trig"),
        (lambda t: paths.velocity_scale("Euler"), "parameterization='Euler' is not known; choose one of euler, trig"),
        (lambda t: paths.solution_coefficients(t, t, "Euler"), "parameterization='Euler' is not known"),
        (lambda t: paths.quotient_coefficients(t, t, t, "Euler"), "parameterization='Euler' is not known"),
        (lambda t: paths.gap_ratio(0.5, "Const", 0.1, 0.2), "schedule='Const' is not known; choose one of const, line"),
    ],
)
def test_a_name_that_is_not_known_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(TIMES)


def test_logit_normal():
    z = _float64([-2.0, 0.0, 1.5])
    expected = [1 / (1 + math.exp(-(0.3 + 0.7 * y))) for y in z.tolist()]
    torch.testing.assert_close(paths.logit_normal(z, 0.3, 0.7), _float64(expected), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("share", "consistency"),
    [
        (0.0, list(range(20))),
        (0.75, [3, 7, 11, 15, 19]),
        (0.9, [9, 19]),
        (1.0, []),
        (1 / 3, [1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16, 17, 19]),
    ],
)
def test_rows_of_each_loss(share, consistency):
    order, n_velocity = paths.row_order(20, share)
    assert order[n_velocity:] == consistency
    assert order[:n_velocity] == [g for g in range(20) if g not in consistency]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.75, 0.9, 0.999, 1.0])
def test_rows_are_spread_evenly_and_independently_of_the_split(share):
    whole, n_velocity = paths.row_order(3000, share, 64)
    is_velocity = set(whole[:n_velocity])
    for n in (1, 7, 60, 250):
        for first in range(0, 3000 - n, n):
            order, count = paths.row_order(n, share, 64 + first)
            assert sorted(order) == list(range(n))
            assert {first + i for i in order[:count]} == is_velocity & set(range(first, first + n))
            assert abs(count - n * Fraction(str(share))) < 1
