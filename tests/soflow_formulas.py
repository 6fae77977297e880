"""The SoFlow losses of a single row in words of float64 arithmetic, and small networks to take them of."""

import math

import torch
from torch import nn

from soflow_fast import SoFlow, dropping
from soflow_fast.kernels.reference import Stream, uniform

NULL = 3  # the number of classes


class Net(nn.Module):
    """A small nonlinear network of everything it is given."""

    num_classes = NULL

    def __init__(self, size=2 * 3 * 3, hidden=11):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {
            "inputs": (size, hidden),
            "times": (4, hidden),
            "table": (NULL + 1, hidden),
            "outputs": (hidden, size),
        }
        for name, shape in shapes.items():
            values = 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(values))

    def forward(self, x, t, s, labels=None):
        y = self.table[torch.full(t.shape, NULL) if labels is None else labels]
        times = torch.stack([t, (3 * t).sin(), t - s, (2 * (t - s)).cos()], 1)
        return (torch.tanh(x.flatten(1) @ self.inputs + times @ self.times + y) @ self.outputs).view_as(x)


class DifferenceNet(Net):
    """The same, with the difference forward by its definition."""

    def forward_difference(self, x, t, s, labels, dx, dt, *, rows=None, mode="difference"):
        F = self(x, t, s, labels)
        rows = slice(None) if rows is None else rows
        x, t, s, labels = (None if y is None else y[rows] for y in (x, t, s, labels))
        with torch.no_grad():
            if mode == "tangent":
                return F, torch.func.jvp(lambda x, t: self(x, t, s, labels), (x, t), (dx, dt))[1]
            return F, self(x + dx, t + dt, s, labels) - self(x, t, s, labels)


def make_model(net=None, objective=SoFlow, **settings):
    """A SoFlow whose settings all matter."""
    settings = {"guidance_scale": 2.5, "guidance_mix": 0.3, "p": 0.7, "eps": 0.05, **settings}
    return objective(net or DifferenceNet(), **settings)


def drops(rows, velocity_share, share, *, seed, step):
    """(B,) bool, the rows that drop their label."""
    group, place = dropping.groups(rows, velocity_share, share)
    return dropping.dropped(place, uniform(group, 1, seed=seed, step=step, stream=Stream.DROP)[:, 0], share)


def samples(n, seed=0):
    """(n, 2, 3, 3) normal."""
    return torch.randn(n, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------- one row of each loss, in words


def path_point(path, x0, noise, t):
    """x_t and v_t."""
    if path == "linear":
        return (1 - t) * x0 + t * noise, noise - x0
    cos, sin = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    return cos * x0 + sin * noise, math.pi / 2 * (cos * noise - sin * x0)


def call(net, x, t, s, label):
    """F of a single row; t may be a tensor to differentiate by."""
    t, s = (y.view(1) if torch.is_tensor(y) else torch.tensor([y], dtype=torch.float64) for y in (t, s))
    return net(x[None], t, s, None if label is None else torch.tensor([label]))[0]


def solution(model, x, t, s, label):
    """f = a x + b F, with one row."""
    F = call(model.network, x, t, s, label)
    if model.parameterization == "euler":
        return x + (s - t) * F
    angle = math.pi / 2 * torch.as_tensor(s - t, dtype=torch.float64)
    return angle.cos() * x + angle.sin() * F


def target_velocity(model, x, v, t, label, dropped, prediction):
    """The guided velocity, given the model's own velocity."""
    if label is None or dropped or model.guidance_scale == 1:
        return v
    q = min(max((1 - t) / (1 - model.guidance_decay_time), 0), 1 - 1e-6) if model.guidance_decay_time < 1 else None
    g = 1 if t <= model.guidance_decay_time else 1 - math.exp(-0.025 * q / (1 - q))
    null = slope(model) * call(model.network, x, t, t, NULL)
    m, w = model.guidance_mix, model.guidance_scale
    return (m * (v + g * (w - 1) * (v - null)) + (1 - m) * prediction).detach()


def slope(model):
    return 1 if model.parameterization == "euler" else math.pi / 2


def seen(label, dropped):
    return NULL if dropped and label is not None else label


def velocity_row(model, x0, noise, t, label, dropped):
    """The loss of a row, its error and its weight."""
    x, v = path_point(model.path, x0, noise, t)
    prediction = slope(model) * call(model.network, x, t, t, seen(label, dropped))
    e = (prediction - target_velocity(model, x, v, t, label, dropped, prediction)).square().mean()
    weight = 1 / (slope(model) * (e.detach() + model.eps) ** model.p)
    return weight * e, e, weight


def consistency_row(model, x0, noise, t, gap, s, label, dropped):
    """The loss of a row, the mean square of its quotient and its weight."""
    x, v = path_point(model.path, x0, noise, t)
    own = slope(model) * call(model.network, x, t, t, label)
    v = target_velocity(model, x, v, t, label, dropped, own)
    label = seen(label, dropped)
    if model.quotient == "tangent":
        times = torch.tensor(t, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
        quotient = torch.func.jvp(lambda x, t: solution(model, x, t, s, label), (x, times[0]), (v, times[1]))[1]
    else:
        after = solution(model, x - gap * v, t - gap, s, label)
        quotient = (solution(model, x, t, s, label) - after) / gap
    e = quotient.detach().square().mean()
    weight = (e + model.eps) ** -model.p
    return -(call(model.network, x, t, s, label) * quotient.detach() * weight).mean(), e, weight


def check(model, out, rows):
    """The output's loss, statistics and every parameter's gradient against those of the rows."""
    losses, errors, weights = (torch.stack(y) for y in zip(*rows, strict=True))
    torch.testing.assert_close(out.loss, losses.mean(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out.mse, errors.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out.weight, weights.detach(), rtol=1e-9, atol=1e-12)
    assert not out.mse.requires_grad
    assert not out.weight.requires_grad
    check_gradients(model, out.loss, losses.mean())


def check_gradients(model, ours, expected, rtol=1e-8):
    gradients = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in (ours, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


def item(values, i):
    """The i-th of optional values."""
    return None if values is None else values[i].item()
