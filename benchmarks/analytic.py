"""Quality without images: SoFlow trained on distributions whose flow map is known, and how far it is from it.

Three data sets, each a mixture of Gaussians, so that the marginal velocity of the linear path is a closed form:

* ``gaussian``: an 8×8 correlated Gaussian; the flow map is linear.
* ``quantiles``: three modes on a line; the flow map is the quantile map.
* ``classes``: eight modes in the plane, ten classes that weight them differently, guidance 1, 2 and 3; the flow map is
  the solution of the (guided) ordinary differential equation, integrated in float64.

The error is the root mean square distance between the trained solution function and the exact one, over the standard
deviation of the exact samples. Three settings differ from the published ones, which are made for thousands of
dimensions: no adaptive weight (p=0), because in few dimensions it depends on a row's own noise and would move the
learnt velocity from the conditional mean towards the mode; more rows for the consistency; wider times.

    python benchmarks/analytic.py [--case NAME] [--seed N] [--json FILE]

Shapes: B rows, D dimensions, K modes, C classes. Samples enter the network as (B, 1, 1, D).
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from _measure import environment
from torch import Tensor, nn

from soflow_fast import SoFlow, pair
from soflow_fast.ema import EMA
from soflow_fast.step import TrainStep

# ------------------------------------------------------------------------------------------------- exact solutions


@dataclass(frozen=True)
class GaussianMixture:
    """``Σ_k w_ck N(m_k, diag(λ_k))`` for class c, in float64; classes are equally likely.

    Attributes:
        means, variances: (K, D). weights: (C, K), rows sum to 1.
    """

    means: Tensor
    variances: Tensor
    weights: Tensor

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``(x0, labels)``: (n, D) float64, (n,) int64."""
        labels = torch.randint(len(self.weights), (n,), generator=generator)
        modes = torch.multinomial(self.weights[labels], 1, generator=generator)[:, 0]
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[modes] + self.variances[modes].sqrt() * z, labels

    def velocity(self, x: Tensor, t: float, labels: Tensor | None = None) -> Tensor:
        """``E[ε − x_0 | x_t = x, label]`` of the linear path, (B, D); labels None: over all classes.

        A mode is ``N((1−t)m, (1−t)²λ+t²)`` at time t, and its own velocity is ``−m + (t−(1−t)λ)/((1−t)²λ+t²)·(x −
        (1−t)m)``; the marginal velocity weights these by the posterior of the modes.
        """
        weights = self.weights.mean(0, keepdim=True) if labels is None else self.weights[labels]
        variance = (1 - t) ** 2 * self.variances + t**2
        deviation = x[:, None] - (1 - t) * self.means
        log_density = -0.5 * (deviation.square() / variance + variance.log()).sum(-1)
        posterior = (weights.log() + log_density).softmax(1)
        slope = (t - (1 - t) * self.variances) / variance
        return (posterior[..., None] * (slope * deviation - self.means)).sum(1)


def linear_flow(mixture: GaussianMixture, noise: Tensor, times: list[float]) -> list[Tensor]:
    """Trajectories of a single Gaussian from noise at t=1: every coordinate keeps its standard score."""
    mean, variance = mixture.means[0], mixture.variances[0]
    return [(1 - t) * mean + ((1 - t) ** 2 * variance + t**2).sqrt() * noise for t in times]


def quantile_flow(mixture: GaussianMixture, noise: Tensor, times: list[float]) -> list[Tensor]:
    """Trajectories of a mixture on the line: a flow in one dimension keeps every sample's quantile."""
    means, variances, weights = mixture.means[:, 0], mixture.variances[:, 0], mixture.weights.mean(0)
    level = torch.special.ndtr(noise)
    trajectory = []
    for t in times:
        low, high = torch.full_like(noise, -20), torch.full_like(noise, 20)
        scale = ((1 - t) ** 2 * variances + t**2).sqrt()
        for _ in range(60):
            middle = (low + high) / 2
            below = (weights * torch.special.ndtr((middle - (1 - t) * means) / scale)).sum(-1, keepdim=True) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        trajectory.append(middle)
    return trajectory


def integrate(velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: list[float], steps: int) -> list[Tensor]:
    """Runge-Kutta trajectory of order 4 from ``x`` at ``times[0]``; steps for each interval."""
    trajectory = [x]
    for start, end in itertools.pairwise(times):
        h = (end - start) / steps
        for i in range(steps):
            t = start + i * h
            k1 = velocity(x, t)
            k2 = velocity(x + h / 2 * k1, t + h / 2)
            k3 = velocity(x + h / 2 * k2, t + h / 2)
            k4 = velocity(x + h * k3, t + h)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        trajectory.append(x)
    return trajectory


def guidance_decay(t: float) -> float:
    """``g(t)`` with the defaults of SoFlow, τ=0.8 and k=0.025."""
    q = min((1 - t) / 0.2, 1 - 1e-6)
    return -math.expm1(-0.025 * q / (1 - q))


def guided_flow(
    mixture: GaussianMixture, noise: Tensor, times: list[float], labels: Tensor, guidance_scale: float
) -> list[Tensor]:
    """Trajectories of ``v(x,t,y) + g(t)(ω−1)(v(x,t,y) − v(x,t))``.

    That velocity is the fixed point of SoFlow's guided target, whatever the share m of the guided part: the rest of
    the target is the prediction itself.
    """

    def velocity(x: Tensor, t: float) -> Tensor:
        own = mixture.velocity(x, t, labels)
        return own + guidance_decay(t) * (guidance_scale - 1) * (own - mixture.velocity(x, t))

    return integrate(velocity, noise, times, steps=150)


# ----------------------------------------------------------------------------------------------------- the network


class _Block(nn.Module):
    """The parameters of one residual block."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down, self.shift = (nn.Linear(width, width) for _ in range(3))


class ModulatedMLP(nn.Module):
    """Residual MLP over flat samples, whose hidden units the times and the label shift, with a difference forward."""

    def __init__(self, dim: int, width: int, depth: int, num_classes: int = 0):
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("frequencies", torch.logspace(-0.5, 1, 12), persistent=False)
        self.embed_t, self.embed_s = nn.Linear(24, width), nn.Linear(24, width)
        self.embed_y = nn.Embedding(num_classes + 1, width)
        self.condition = nn.Linear(width, width)
        self.inputs = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.outputs = nn.Linear(width, dim)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """``F(x, t, s, labels)``, as :meth:`soflow_fast.DiT.forward`."""
        c = self.embed_t(self._sinusoids(t)) + self.embed_s(self._sinusoids(t - s)) + self._embed_labels(labels, t)
        c = nn.functional.silu(self.condition(nn.functional.silu(c)))
        h = self.inputs(x.flatten(1))
        for block in self.blocks:
            h = h + block.down(nn.functional.gelu(block.up(h) + block.shift(c), approximate="tanh"))
        shift, scale = self.modulation(c).chunk(2, 1)
        return self.outputs(h * (1 + scale) + shift).view_as(x)

    def forward_difference(self, x, t, s, labels, dx, dt, *, rows=slice(None), mode="difference"):
        """``F`` and, on some rows, its difference, as :meth:`soflow_fast.DiT.forward_difference`."""
        tangent = mode == "tangent"
        times = [pair.Pair(tau, _spread(dt, rows, tau), tangent) for tau in (t, t - s)]
        t_features, s_features = (pair.sinusoids(tau, self.frequencies) for tau in times)
        c = pair.add(_linear(self.embed_t, t_features), _linear(self.embed_s, s_features))
        c = pair.add(c, pair.constant(self._embed_labels(labels, t), c))
        c = pair.silu(_linear(self.condition, pair.silu(c)))
        h = _linear(self.inputs, pair.Pair(x, _spread(dx, rows, x), tangent).map(lambda y: y.flatten(1)))
        for block in self.blocks:
            u = pair.add(_linear(block.up, h), _linear(block.shift, c))
            h = pair.add(h, _linear(block.down, pair.gelu(u)))
        F, dF = _linear(self.outputs, pair.modulate(h, *_linear(self.modulation, c).chunk(2)))
        return F.view_as(x), dF[rows].view_as(dx)

    def _sinusoids(self, t: Tensor) -> Tensor:
        phase = t[:, None] * self.frequencies
        return torch.cat([phase.cos(), phase.sin()], dim=1)

    def _embed_labels(self, labels: Tensor | None, t: Tensor) -> Tensor:
        return self.embed_y(torch.full(t.shape, self.num_classes) if labels is None else labels)


def _linear(layer: nn.Linear, x: pair.Pair) -> pair.Pair:
    return pair.linear(x, layer.weight, layer.bias)


def _spread(d: Tensor, rows: slice, like: Tensor) -> Tensor:
    """The differences of some rows among zeros for the others."""
    full = torch.zeros_like(like)
    full[rows] = d
    return full


# ------------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class Case:
    """A data set, the network and steps it takes, and the largest errors allowed.

    Attributes:
        flow: ``flow(mixture, noise, times, ...)``, exact trajectories from noise. axes: (D, D) orthogonal, the
            directions of the mixture's coordinates. bars: for each guidance scale, of one step and of any (t, s).
    """

    mixture: GaussianMixture
    flow: Callable[..., list[Tensor]]
    axes: Tensor
    bars: dict[float, tuple[float, float | None]]
    width: int
    depth: int
    steps: int
    batch: int
    lr: float

    @property
    def num_classes(self) -> int:
        """0 where the data has no labels."""
        classes = len(self.mixture.weights)
        return classes if classes > 1 else 0


def _gaussian() -> Case:
    """Covariance decays with the distance, faster along rows than along columns; the mean is a wave."""
    i = torch.arange(8, dtype=torch.float64)
    distance = (i[:, None] - i).abs()
    covariance = torch.kron((-distance / 3).exp(), (-distance / 1.5).exp())
    variances, axes = torch.linalg.eigh(covariance)
    mean = 0.5 * torch.cos(math.pi / 8 * (i[:, None] + i)).flatten()
    mixture = GaussianMixture((mean @ axes)[None], variances[None], torch.ones(1, 1, dtype=torch.float64))
    return Case(mixture, linear_flow, axes, {1.0: (0.03, 0.05)}, width=128, depth=1, steps=8000, batch=512, lr=4e-3)


def _quantiles() -> Case:
    means, deviations, weights = torch.tensor([[-1.5, 0.2, 2.0], [0.5, 0.4, 0.5], [0.3, 0.4, 0.3]], dtype=torch.float64)
    mixture = GaussianMixture(means[:, None], deviations[:, None].square(), weights[None])
    axes = torch.eye(1, dtype=torch.float64)
    return Case(mixture, quantile_flow, axes, {1.0: (0.03, None)}, width=64, depth=3, steps=6000, batch=1024, lr=2e-3)


def _classes() -> Case:
    """A class prefers the modes in its direction: its weights are those of a von Mises distribution."""
    directions, classes = (2 * math.pi / n * torch.arange(n, dtype=torch.float64) for n in (8, 10))
    means = 1.5 * torch.stack([directions.cos(), directions.sin()], 1)
    weights = (1.5 * (classes[:, None] - directions).cos()).softmax(1)
    mixture = GaussianMixture(means, torch.full((8, 2), 0.35**2, dtype=torch.float64), weights)
    axes = torch.eye(2, dtype=torch.float64)
    bars = {1.0: (0.05, None), 2.0: (0.07, None), 3.0: (0.07, None)}
    return Case(mixture, guided_flow, axes, bars, width=64, depth=3, steps=8000, batch=1024, lr=2e-3)


CASES = {"gaussian": _gaussian, "quantiles": _quantiles, "classes": _classes}

# -------------------------------------------------------------------------------------------- training and measure

TIMES = [1.0, 0.75, 0.5, 0.25, 0.0]


def train(case: Case, guidance_scale: float, steps: int, seed: int) -> SoFlow:
    """A SoFlow of the case's network after so many steps, with its averaged weights."""
    torch.manual_seed(seed)
    model = SoFlow(
        ModulatedMLP(case.mixture.means.shape[1], case.width, case.depth, case.num_classes),
        guidance_scale=guidance_scale,
        label_drop=0.1 if case.num_classes else 0.0,
        p=0.0,
        velocity_share=0.25,
        time_mean=(0.0, -1.5, 1.0),
        time_std=(1.5, 2.0, 2.0),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=case.lr, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 200) * 0.5 * (1 + math.cos(math.pi * k / steps))
    )
    ema = EMA(model, decay=0.999)
    step = TrainStep(model, optimizer=optimizer, ema=ema, total_steps=steps, seed=seed, grad_clip=1.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x0, labels = case.mixture.sample(case.batch, generator)
        x0 = (x0 @ case.axes.T).float().view(case.batch, 1, 1, -1)
        step(x0, labels if case.num_classes else None)
        schedule.step()
    model.load_state_dict(ema.state_dict())
    return model


@torch.no_grad()
def errors(case: Case, model: SoFlow, guidance_scale: float, rows: int = 4096) -> dict[tuple[float, float], float]:
    """The relative error of ``f(x_t, t, s)`` for t and s in ``TIMES``, at points x_t of exact trajectories."""
    generator = torch.Generator().manual_seed(2**31)
    noise = torch.randn(rows, case.mixture.means.shape[1], generator=generator, dtype=torch.float64)
    labels = torch.randint(max(case.num_classes, 1), (rows,), generator=generator) if case.num_classes else None
    arguments = (labels, guidance_scale) if case.num_classes else ()
    trajectory = [x @ case.axes.T for x in case.flow(case.mixture, noise, TIMES, *arguments)]
    result = {}
    for i, t in enumerate(TIMES):
        for s, x_s in zip(TIMES[i + 1 :], trajectory[i + 1 :], strict=True):
            x_t = trajectory[i].float().view(rows, 1, 1, -1)
            ours = model.solution(x_t, torch.full((rows,), t), torch.full((rows,), s), labels).flatten(1)
            error, spread = (ours - x_s).square().mean(), (x_s - x_s.mean(0)).square().mean()
            result[t, s] = (error / spread).sqrt().item()
    return result


def run(name: str, guidance_scale: float, steps: int | None = None, seed: int = 0) -> dict:
    """Trains and measures one case; steps default to the case's own."""
    case = CASES[name]()
    steps = steps or case.steps
    started = time.perf_counter()
    model = train(case, guidance_scale, steps, seed)
    seconds = time.perf_counter() - started
    table = errors(case, model, guidance_scale)
    bar, bar_any = case.bars[guidance_scale]
    return {
        "case": name,
        "guidance_scale": guidance_scale,
        "steps": steps,
        "batch": case.batch,
        "one_step": table[1.0, 0.0],
        "one_step_bar": bar,
        "any": max(table.values()),
        "any_bar": bar_any,
        "errors": [{"t": t, "s": s, "error": error} for (t, s), error in table.items()],
        "seconds": round(seconds, 1),
    }


def passes(result: dict) -> bool:
    """Whether a result is within its bars."""
    return result["one_step"] <= result["one_step_bar"] and (
        result["any_bar"] is None or result["any"] <= result["any_bar"]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    results = []
    print(f"{'case':<11}{'guidance':>9}{'one step':>10}{'bar':>6}{'any (t,s)':>11}{'bar':>6}{'seconds':>9}")
    for name in [options.case] if options.case else CASES:
        for guidance_scale in CASES[name]().bars:
            result = run(name, guidance_scale, seed=options.seed)
            bar = "" if result["any_bar"] is None else f"{result['any_bar']:.0%}"
            print(
                f"{name:<11}{guidance_scale:>9.1f}{result['one_step']:>10.2%}{result['one_step_bar']:>6.0%}"
                f"{result['any']:>11.2%}{bar:>6}{result['seconds']:>9.0f}{'' if passes(result) else '  missed'}",
                flush=True,
            )
            results.append(result)
    if options.json:
        report = {"environment": environment(), "seed": options.seed, "results": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(passes(result) for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
