"""Data whose flow map is known: the exact solution is a stationary point of both losses, and training finds it.

In expectation over (x_0, ε) the exact solution has no velocity gradient, and a consistency gradient proportional to
the gap. The expectations here are quadratures in one dimension; each row has an additive parameter of its own, whose
gradient is that row's.
"""

import math

import analytic
import numpy
import pytest
import torch
from torch import nn

from soflow_fast import SoFlow

RATIOS = (0.01, 0.005, 0.0025)  # the gap as a share of t − s


def _float64(values):
    return torch.tensor(values, dtype=torch.float64)


# --------------------------------------------------------------------------------- exact solutions of one-mode data


class Gaussian:
    """One-dimensional Gaussian data on either path: every sample keeps its standard score."""

    num_classes = 2

    def __init__(self, path):
        self.path, self.means, self.variance = path, _float64([0.7, -0.4, 0.2]), 0.3
        self.modes = [(0.7, math.sqrt(0.3), 1.0)]  # of label 0: mean, standard deviation, share

    def _mean_and_deviation(self, t, labels):
        angle = math.pi / 2 * t
        alpha, beta = (1 - t, t) if self.path == "linear" else (angle.cos(), angle.sin())
        return alpha * self.means[labels], (alpha**2 * self.variance + beta**2).sqrt()

    def flow(self, x, t, s, labels):
        """Where x at time t is at time s; all (B,)."""
        (mean, deviation), (mean_s, deviation_s) = (self._mean_and_deviation(tau, labels) for tau in (t, s))
        return mean_s + deviation_s / deviation * (x - mean)

    def velocity(self, x, t, labels):
        """The marginal velocity, the derivative of the flow by its end."""
        return torch.func.jvp(lambda s: self.flow(x, t, s, labels), (t,), (torch.ones_like(t),))[1]


class ThreeModes:
    """The mixture of the benchmark's case ``quantiles``, whose flow map is the quantile map."""

    num_classes, path = 0, "linear"

    def __init__(self):
        self.mixture = analytic.CASES["quantiles"]().mixture
        parameters = (self.mixture.means[:, 0], self.mixture.variances[:, 0].sqrt(), self.mixture.weights[0])
        self.modes = torch.stack(parameters, 1).tolist()

    def _levels(self, x, t):
        means, variances = self.mixture.means[:, 0], self.mixture.variances[:, 0]
        deviations = ((1 - t)[:, None] ** 2 * variances + t[:, None] ** 2).sqrt()
        return (self.mixture.weights[0] * torch.special.ndtr((x[:, None] - (1 - t)[:, None] * means) / deviations)).sum(
            1
        )

    def flow(self, x, t, s, labels):
        """The quantile map from time t to time s, by bisection; s is the same for all rows."""
        level = self._levels(x, t)
        low, high = torch.full_like(x, -20), torch.full_like(x, 20)
        for _ in range(70):
            middle = (low + high) / 2
            below = self._levels(middle, s) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return middle

    def velocity(self, x, t, labels):
        return self.mixture.velocity(x[:, None], t[0].item())[:, 0]


def alpha_beta(data, t):
    """The path's factors of data and noise at a single time."""
    return (1 - t, t) if data.path == "linear" else (math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t))


def quadrature(data, t):
    """``x_0, ε, x_t`` and weights, (n,) each, that give expectations over the data (of label 0) and the noise.

    For each mode N(m, σ²), x_t is ``αm + Su`` and the velocity varies with w, where u and w are independent standard
    normal variables: a fine grid over u, along which the exact solutions bend, and a Gauss-Hermite rule over w.
    """
    alpha, beta = alpha_beta(data, t)
    u = torch.linspace(-9, 9, 401, dtype=torch.float64)
    w, w_weights = (_float64(y) for y in numpy.polynomial.hermite_e.hermegauss(12))
    weights = torch.outer(torch.exp(-u * u / 2), w_weights)
    points = []
    for mean, deviation, share in data.modes:
        spread = math.hypot(alpha * deviation, beta)
        along, across = alpha * deviation / spread, beta / spread
        x0 = mean + deviation * (along * u[:, None] + across * w)
        noise = across * u[:, None] - along * w
        points.append(torch.stack([x0, noise, share * weights / weights.sum()]).flatten(1))
    x0, noise, weights = torch.cat(points, 1)
    return x0, noise, alpha * x0 + beta * noise, weights


class Exact(nn.Module):
    """The network whose solution function is the exact flow, plus a parameter for each row."""

    def __init__(self, data, parameterization, rows):
        super().__init__()
        self.data, self.parameterization, self.num_classes = data, parameterization, data.num_classes
        self.offset = nn.Parameter(torch.zeros(rows, dtype=torch.float64))

    def forward(self, x, t, s, labels=None):
        labels = torch.full(t.shape, self.num_classes) if labels is None else labels
        flat = x.flatten()
        if torch.equal(t, s):
            scale = 1 if self.parameterization == "euler" else math.pi / 2
            F = self.data.velocity(flat, t, labels) / scale
        else:
            angle = math.pi / 2 * (s - t)
            a, b = (1, s - t) if self.parameterization == "euler" else (angle.cos(), angle.sin())
            F = (self.data.flow(flat, t, s, labels) - a * flat) / b
        return (F + self.offset).view_as(x)


def _model(data, parameterization, rows, **settings):
    net = Exact(data, parameterization, rows)
    settings = {"guidance_scale": 1.0, "p": 0.0, "quotient": "two_forwards", **settings}
    return SoFlow(net, path=data.path, parameterization=parameterization, **settings)


def _as_samples(x):
    return x.view(-1, 1, 1, 1)


def _labels(data, like):
    return torch.zeros(len(like), dtype=torch.int64) if data.num_classes else None


def _row_gradients(model, out):
    """The derivative of each row's own loss by its parameter."""
    return torch.autograd.grad(out.loss, model.network.offset)[0] * len(out.t)


def _test_functions(x):
    """Functions of x_t whose product with an error must vanish on average."""
    return [torch.ones_like(x), x, torch.sin(x), torch.cos(x)]


PROBLEMS = [
    pytest.param(lambda: Gaussian("linear"), "euler", id="gaussian-linear-euler"),
    pytest.param(lambda: Gaussian("linear"), "trig", id="gaussian-linear-trig"),
    pytest.param(lambda: Gaussian("trig"), "euler", id="gaussian-trig-euler"),
    pytest.param(lambda: Gaussian("trig"), "trig", id="gaussian-trig-trig"),
    pytest.param(ThreeModes, "euler", id="mixture-linear-euler"),
    pytest.param(ThreeModes, "trig", id="mixture-linear-trig"),
]


@pytest.mark.parametrize(("make_data", "parameterization"), PROBLEMS)
def test_the_exact_solution_has_no_velocity_gradient(make_data, parameterization):
    data = make_data()
    for time in (0.2, 0.5, 0.9):
        x0, noise, x_t, weights = quadrature(data, time)
        model, labels = _model(data, parameterization, len(x0)), _labels(data, x0)
        out = model.velocity_loss(_as_samples(x0), _as_samples(noise), torch.full_like(x0, time), labels)
        gradients = _row_gradients(model, out)
        for h in _test_functions(x_t):
            assert abs((weights * gradients * h).sum()) < 1e-8
            assert (weights * (gradients * h).abs()).sum() > 0.1


@pytest.mark.parametrize(("make_data", "parameterization"), PROBLEMS)
def test_the_consistency_gradient_of_the_exact_solution_halves_with_the_gap(make_data, parameterization):
    data = make_data()
    x0, noise, x_t, weights = quadrature(data, 0.8)
    model, labels = _model(data, parameterization, len(x0)), _labels(data, x0)
    t, s = torch.full_like(x0, 0.8), torch.full_like(x0, 0.2)
    norms, sizes = [], []
    for ratio in RATIOS:
        out = model.consistency_loss(_as_samples(x0), _as_samples(noise), t, None, s, labels, gap=ratio * (t - s))
        gradients = _row_gradients(model, out)
        norms.append(torch.stack([(weights * gradients * h).sum() for h in _test_functions(x_t)]).norm().item())
        sizes.append((weights * gradients.square()).sum().sqrt().item())
    assert norms[0] / norms[1] == pytest.approx(2, rel=0.05)
    assert norms[1] / norms[2] == pytest.approx(2, rel=0.05)
    # a single row's gradient does not shrink: x_l was reached by the conditional velocity
    assert sizes[2] == pytest.approx(sizes[0], rel=0.05)
    assert sizes[2] > 20 * norms[2]


@pytest.mark.parametrize(("make_data", "parameterization"), PROBLEMS)
def test_along_the_marginal_velocity_the_quotient_itself_halves_with_the_gap(make_data, parameterization):
    data = make_data()
    x_t = torch.linspace(-2, 2, 41, dtype=torch.float64)
    t, s = torch.full_like(x_t, 0.8), torch.full_like(x_t, 0.2)
    labels = _labels(data, x_t)
    v = data.velocity(x_t, t, labels)
    # the data and the noise whose path runs through x_t with that velocity
    alpha, beta = alpha_beta(data, 0.8)
    dalpha, dbeta = (-1, 1) if data.path == "linear" else (-math.pi / 2 * beta, math.pi / 2 * alpha)
    determinant = alpha * dbeta - beta * dalpha
    x0, noise = (dbeta * x_t - beta * v) / determinant, (alpha * v - dalpha * x_t) / determinant
    model = _model(data, parameterization, len(x_t))
    quotients = []
    for ratio in RATIOS:
        out = model.consistency_loss(_as_samples(x0), _as_samples(noise), t, None, s, labels, gap=ratio * (t - s))
        quotients.append(out.mse.mean().sqrt().item())
    assert quotients[0] / quotients[1] == pytest.approx(2, rel=0.05)
    assert quotients[1] / quotients[2] == pytest.approx(2, rel=0.05)
    assert quotients[2] < 0.05


@pytest.mark.parametrize("mix", [0.25, 1.0])
def test_the_guided_target_is_the_guided_marginal_velocity_in_expectation(mix):
    class Guided(Gaussian):
        """Its labelled velocity is already guided, as after training."""

        def velocity(self, x, t, labels):
            own, null = super().velocity(x, t, labels), super().velocity(x, t, torch.full_like(labels, 2))
            strength = torch.where(labels == 2, 0.0, 1.5 * analytic.guidance_decay(t[0].item()))
            return own + strength * (own - null)

    data = Guided("linear")
    for time in (0.3, 0.83, 0.95):
        x0, noise, x_t, weights = quadrature(data, time)
        model = _model(data, "euler", len(x0), guidance_scale=2.5, guidance_mix=mix)
        t = torch.full_like(x0, time)
        gradients = _row_gradients(
            model, model.velocity_loss(_as_samples(x0), _as_samples(noise), t, _labels(data, x0))
        )
        for h in _test_functions(x_t):
            assert abs((weights * gradients * h).sum()) < 1e-8


# --------------------------------------------------------------------------------------- the benchmark's own truths


def test_closed_form_flows_follow_the_closed_form_velocity():
    for name in ("gaussian", "quantiles"):
        case = analytic.CASES[name]()
        noise = torch.randn(64, case.mixture.means.shape[1], generator=torch.Generator().manual_seed(0)).double()
        exact = case.flow(case.mixture, noise, analytic.TIMES)
        integrated = analytic.integrate(case.mixture.velocity, noise, analytic.TIMES, steps=200)
        for a, b in zip(exact, integrated, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_guided_flow_is_accurate():
    case = analytic.CASES["classes"]()
    noise = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(20) % 10
    ours = case.flow(case.mixture, noise, analytic.TIMES, labels, 3.0)[-1]

    def velocity(x, t):
        own, null = case.mixture.velocity(x, t, labels), case.mixture.velocity(x, t)
        return own + 2 * analytic.guidance_decay(t) * (own - null)

    finer = analytic.integrate(velocity, noise, [1.0, 0.0], steps=1000)[-1]
    assert (ours - finer).abs().max() < 1e-4


def test_the_mlp_carries_its_difference():
    torch.manual_seed(0)
    net = analytic.ModulatedMLP(5, 16, 2, 3).double()
    x, dx = torch.randn(2, 6, 1, 1, 5).double()
    t, dt = torch.rand(6).double(), 1e-3 * torch.randn(6).double()
    s, labels, dx = t / 2, torch.tensor([0, 1, 2, 3, 0, 1]), 1e-3 * dx
    F, dF = net.forward_difference(x, t, s, labels, dx[2:], dt[2:], rows=slice(2, None))
    torch.testing.assert_close(F, net(x, t, s, labels), rtol=0, atol=1e-14)
    moved = net(x[2:] + dx[2:], t[2:] + dt[2:], s[2:], labels[2:])
    torch.testing.assert_close(dF, moved - F[2:].detach(), rtol=0, atol=1e-14)
    tangent = net.forward_difference(x, t, s, labels, dx, dt, mode="tangent")[1]
    derivative = torch.func.jvp(lambda x, t: net(x, t, s, labels), (x, t), (dx, dt))[1]
    torch.testing.assert_close(tangent, derivative, rtol=0, atol=1e-15)


# ------------------------------------------------------------------------------------ the short form of the benchmark


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "guidance_scale", "steps", "bar"),
    [("quantiles", 1.0, 500, 0.15), ("classes", 2.0, 400, 0.25)],
)
def test_training_approaches_the_flow_map(name, guidance_scale, steps, bar):
    result = analytic.run(name, guidance_scale, steps)
    assert result["one_step"] < bar
    assert result["any"] < 1.25 * bar
