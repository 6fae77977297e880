"""Both SoFlow losses and their gradients against formulas in float64, and every setting that is refused."""

import itertools
import math

import pytest
import torch
from soflow_formulas import (
    NULL,
    Net,
    check,
    consistency_row,
    item,
    make_model,
    path_point,
    samples,
    solution,
    velocity_row,
)

from soflow_fast import DiT

T = torch.tensor([0.15, 0.6, 0.82, 0.95, 0.999], dtype=torch.float64)
GAP = torch.tensor([0.05, 0.02, 0.3, 1e-3, 0.999], dtype=torch.float64)
S = torch.tensor([0.0, 0.3, 0.2, 0.9, 0.0], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 1, 0])
DROP = torch.tensor([False, True, False, False, False])

FORMS = list(itertools.product(["linear", "trig"], ["euler", "trig"]))
# guidance scale, labels, drop
CONDITIONS = {
    "guided": (2.5, LABELS, DROP),
    "guided, nothing dropped": (2.5, LABELS, None),
    "unguided": (1.0, LABELS, DROP),
    "unconditional": (2.5, None, DROP),
}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(("path", "parameterization"), FORMS)
def test_velocity_loss(path, parameterization, condition):
    scale, labels, drop = CONDITIONS[condition]
    model = make_model(path=path, parameterization=parameterization, guidance_scale=scale)
    x0, noise = samples(5), samples(5, seed=1)
    out = model.velocity_loss(x0, noise, T, labels, drop)
    rows = [velocity_row(model, x0[i], noise[i], T[i].item(), item(labels, i), bool(item(drop, i))) for i in range(5)]
    check(model, out, rows)
    assert torch.equal(out.t, T)


@pytest.mark.parametrize("quotient", ["difference", "two_forwards", "tangent"])
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(("path", "parameterization"), FORMS)
def test_consistency_loss(path, parameterization, condition, quotient):
    scale, labels, drop = CONDITIONS[condition]
    model = make_model(path=path, parameterization=parameterization, guidance_scale=scale, quotient=quotient)
    x0, noise = samples(5), samples(5, seed=1)
    times = zip(T.tolist(), GAP.tolist(), S.tolist(), strict=True)
    rows = [
        consistency_row(model, x0[i], noise[i], *row, item(labels, i), bool(item(drop, i)))
        for i, row in enumerate(times)
    ]
    check(model, model.consistency_loss(x0, noise, T, None, S, labels, drop, gap=GAP), rows)
    check(model, model.consistency_loss(x0, noise, T, T - GAP, S, labels, drop), rows)


@pytest.mark.parametrize("decay_time", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_guidance_decay_and_mix(decay_time, mix):
    model = make_model(guidance_decay_time=decay_time, guidance_mix=mix)
    x0, noise = samples(5), samples(5, seed=1)
    rows = [velocity_row(model, x0[i], noise[i], T[i].item(), LABELS[i].item(), False) for i in range(5)]
    losses, errors, _ = (torch.stack(y) for y in zip(*rows, strict=True))
    out = model.velocity_loss(x0, noise, T, LABELS)
    torch.testing.assert_close(out.loss, losses.mean(), rtol=1e-9, atol=1e-12)
    # without a share of the guided target, the prediction is its own target
    assert errors.any() == out.mse.any() == (mix > 0)


@pytest.mark.parametrize("parameterization", ["euler", "trig"])
def test_consistency_gradient_is_that_of_the_squared_error_by_finite_differences(parameterization):
    model = make_model(parameterization=parameterization)
    x0, noise = samples(5), samples(5, seed=1)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]
    loss = model.consistency_loss(x0, noise, T, None, S, None, gap=GAP)
    gradients = torch.autograd.grad(loss.loss, list(model.parameters()))
    ours = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

    points = [path_point("linear", x0[i], noise[i], T[i].item()) for i in range(5)]
    x, v = (torch.stack(y) for y in zip(*points, strict=True))
    with torch.no_grad():
        x_l = x - GAP.view(-1, 1, 1, 1) * v
        frozen = [solution(model, x_l[i], (T - GAP)[i].item(), S[i].item(), None) for i in range(5)]

        def weighted_squared_error(h):
            """``w/(2|b|(t−l))·‖f_θ(x_t,t,s) − f(x_l,l,s)‖²``, the second f and w frozen, at θ + h·direction."""
            for p, d in zip(model.parameters(), directions, strict=True):
                p += h * d
            total = 0.0
            for i in range(5):
                span = (T[i] - S[i]).item()
                b = span if parameterization == "euler" else math.sin(math.pi / 2 * span)
                error = (solution(model, x[i], T[i].item(), S[i].item(), None) - frozen[i]).square().mean()
                total += loss.weight[i] * error / (2 * b * GAP[i]) / 5
            for p, d in zip(model.parameters(), directions, strict=True):
                p -= h * d
            return total

        numeric = (weighted_squared_error(1e-5) - weighted_squared_error(-1e-5)) / 2e-5
    assert ours.item() == pytest.approx(numeric.item(), rel=1e-5)


def test_gap_is_kept_where_l_rounds_to_t():
    model = make_model(min_gap=0, net=DiT(8, 4, 2, 16, 1, 2, num_classes=NULL))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    x0, noise = torch.randn(2, 3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    t, s = torch.full((3,), 0.9), torch.full((3,), 0.1)
    losses = []
    for gap in (1e-3, 1e-6, 1e-9):
        losses.append(model.consistency_loss(x0, noise, t, None, s, LABELS[:3], gap=torch.full((3,), gap)).loss.item())
    assert torch.tensor(0.9) - 1e-9 == torch.tensor(0.9)
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-2)
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)


def test_two_forwards_leaves_autocast():
    model = make_model(quotient="two_forwards", net=Net().float(), guidance_scale=1.0)
    arguments = [y.float() for y in (samples(5), samples(5, seed=1), T, T - GAP, S)]
    plain = model.consistency_loss(*arguments, LABELS).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert model.consistency_loss(*arguments, LABELS).loss == plain


@pytest.mark.parametrize(("path", "parameterization"), FORMS)
def test_velocity_and_solution(path, parameterization):
    model, x = make_model(path=path, parameterization=parameterization), samples(5)
    with torch.no_grad():
        solved, velocity = model.solution(x, T, S, LABELS), model.velocity(x, T, LABELS)
        for i in range(5):
            t, s, y = T[i].item(), S[i].item(), LABELS[i].item()
            torch.testing.assert_close(solved[i], solution(model, x[i], t, s, y), rtol=1e-12, atol=1e-12)
            forward, backward = (solution(model, x[i], t, t + h, y) for h in (1e-6, -1e-6))
            torch.testing.assert_close(velocity[i], (forward - backward) / 2e-6, rtol=1e-8, atol=1e-8)
        assert torch.equal(model.solution(x, T, T, LABELS), x)


# ------------------------------------------------------------------------------------------------------ bad settings


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"path": "cosine"}, "path='cosine' is not known; choose one of linear, trig"),
        ({"parameterization": "linear"}, "parameterization='linear' is not known; choose one of euler, trig"),
        ({"gap_schedule": "step"}, "gap_schedule='step' is not known; choose one of const, linear, cosine"),
        ({"quotient": "jvp"}, "quotient='jvp' is not known; choose one of difference, two_forwards, tangent"),
        ({"guidance_scale": -1.0}, r"guidance_scale=-1.0 is outside \[0, inf\]"),
        ({"guidance_mix": 1.5}, r"guidance_mix=1.5 is outside \[0, 1\]"),
        ({"label_drop": -0.1}, r"label_drop=-0.1 is outside \[0, 1\]"),
        ({"velocity_share": 1.01}, r"velocity_share=1.01 is outside \[0, 1\]"),
        ({"eps": -1e-3}, "eps=-0.001 is outside"),
        ({"min_gap": 2.0}, "min_gap=2.0 is outside"),
        ({"gap_init": 0.0}, r"gap_init=0.0 is outside \(0, 1\]"),
        ({"gap_end": 1.5}, r"gap_end=1.5 is outside \(0, 1\]"),
        ({"time_mean": (0.0, 1.0)}, "time_mean=.* needs 3 numbers"),
        ({"time_std": (1.0, 1.0, 1.0, 1.0)}, "time_std=.* needs 3 numbers"),
        ({"time_std": (1.0, -1.0, 1.0)}, r"time_std=-1.0 is outside \[0, inf\]"),
        ({"time_std": (1.0, math.nan, 1.0)}, "time_std=nan is outside"),
        ({"time_mean": (1.0, math.nan, 1.0)}, "time_mean=nan is outside"),
        ({"guidance_decay_time": -3.0}, r"guidance_decay_time=-3.0 is outside \[0, inf\]"),
        ({"guidance_decay_time": math.nan}, "guidance_decay_time=nan is outside"),
        ({"p": -2.0}, r"p=-2.0 is outside \[0, inf\]"),
        ({"label_drop": 0.0}, "guidance_scale=2.5 needs a 'no label' prediction, which label_drop=0 never trains"),
        ({"quotient": "two_forwards", "min_gap": 0.0}, "min_gap=0 divides rounding error by nothing"),
        ({"impl": "cuda"}, "impl='cuda' is not known"),
    ],
)
def test_impossible_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_model(**settings)


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}])
def test_a_network_without_a_null_label_cannot_be_guided_or_drop_labels(settings):
    net = DiT(8, 4, 2, 16, 1, 2, num_classes=NULL, class_dropout_prob=0)
    with pytest.raises(ValueError, match="no row for 'no label'"):
        make_model(net, **settings)
    make_model(net, guidance_scale=1.0, label_drop=0.0)


@pytest.mark.parametrize("both", [True, False])
def test_consistency_loss_takes_one_of_l_and_gap(both):
    l, gap = (T - GAP, GAP) if both else (None, None)
    with pytest.raises(ValueError, match="exactly one of l and gap"):
        make_model().consistency_loss(samples(5), samples(5), T, l, S, LABELS, gap=gap)
