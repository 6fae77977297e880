"""The loss of a whole batch: its draws, its split into parts, and its times."""

import math

import pytest
import torch
from _baselines import SixCalls
from soflow_formulas import (
    NULL,
    check_gradients,
    consistency_row,
    drops,
    item,
    make_model,
    samples,
    velocity_row,
)

from soflow_fast import SoFlow
from soflow_fast.kernels.reference import Stream, normal

LABELS = torch.tensor([0, 1, 2, 1, 0])


def expected_loss(model, x0, labels, progress, seed, step, first_row=0):
    """The mean over the rows of a batch, each with its own draws; rows 3, 7, 11, ... train the consistency."""
    rows = first_row + torch.arange(len(x0))
    z = normal(rows, 2, seed=seed, step=step, stream=Stream.TIMES)
    noise = normal(rows, x0[0].numel(), seed=seed, step=step, stream=Stream.NOISE).view(x0.shape).double()
    drop = drops(rows, 0.75, model.label_drop, seed=seed, step=step)
    losses = []
    for i in range(len(x0)):
        label, dropped = item(labels, i), drop[i].item()
        if (first_row + i) % 4 < 3:
            t = torch.sigmoid(-0.2 + 1.0 * z[i, 0]).item()
            losses.append(velocity_row(model, x0[i], noise[i], t, label, dropped)[0])
        else:
            t = max(torch.sigmoid(0.2 + 0.8 * z[i, 0]).item(), 1e-4)
            s = min(torch.sigmoid(-1.0 + 0.8 * z[i, 1]).item(), t - 1e-4)
            gap = min(max((t - s) * 0.1 * (0.002 / 0.1) ** progress, 1e-4), t - s)
            losses.append(consistency_row(model, x0[i], noise[i], t, gap, s, label, dropped)[0])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("objective", [SixCalls, SoFlow])
@pytest.mark.parametrize("quotient", ["difference", "two_forwards"])
@pytest.mark.parametrize("labelled", [True, False])
def test_loss_of_a_batch(labelled, quotient, objective):
    model = make_model(objective=objective, quotient=quotient, label_drop=0.4)
    x0, labels = samples(12), torch.arange(12) % NULL if labelled else None
    expected = expected_loss(model, x0, labels, 0.3, seed=2**40 + 1, step=6)
    calls = []
    with model.network.register_forward_hook(lambda *_: calls.append(1)):
        out = model.loss(x0, labels, 0.3, seed=2**40 + 1, step=6)
    if quotient == "two_forwards":  # else the network makes calls of its own
        assert len(calls) == {SixCalls: (3, 6), SoFlow: (2, 3)}[objective][labelled]
    # times are drawn in float32: their last bit may differ, and a gap of 1e-3 enlarges that
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=0)
    check_gradients(model, out.loss, expected, rtol=1e-3)
    velocity, consistency = out.parts["velocity"], out.parts["consistency"]
    torch.testing.assert_close(out.loss, velocity.loss * 9 / 12 + consistency.loss * 3 / 12, rtol=1e-12, atol=0)
    assert (len(velocity.t), len(consistency.t)) == (9, 3)


@pytest.mark.parametrize("objective", [SixCalls, SoFlow])
def test_latent_moments_are_sampled(objective):
    model = make_model(objective=objective)
    moments = torch.cat([samples(4), samples(4, seed=1).abs()], 1)
    rows = torch.tensor([0, 1, 2, 3])
    out = model.loss_of_rows(moments, LABELS[:4], rows, 3, 0.3, 5, 6, 0.18215)
    fresh = normal(rows, 18, seed=5, step=6, stream=Stream.LATENT).view(4, 2, 3, 3).double()
    x0 = (moments[:, :2] + moments[:, 2:] * fresh) * 0.18215
    torch.testing.assert_close(out.loss, expected_loss(model, x0, LABELS[:4], 0.3, 5, 6), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("share", "name"), [(1.0, "velocity"), (0.0, "consistency")])
@pytest.mark.parametrize("objective", [SixCalls, SoFlow])
def test_an_empty_part_contributes_nothing(share, name, objective):
    model = make_model(objective=objective, velocity_share=share)
    rows = torch.arange(5)
    out = model.loss_of_rows(samples(5), LABELS, rows, int(5 * share), 0.5, 0, 0)
    assert list(out.parts) == [name]
    torch.testing.assert_close(out.loss, out.parts[name].loss, rtol=1e-12, atol=0)
    assert out.loss.requires_grad


def test_loss_does_not_depend_on_how_the_batch_is_split():
    model = make_model(label_drop=0.4)
    x0, labels = samples(24), torch.arange(24) % NULL
    whole = model.loss(x0, labels, 0.3, seed=7, step=8, first_row=0).loss
    for sizes in ((8, 16), (12, 12), (4,) * 6):
        parts, first = 0.0, 0
        for n in sizes:
            part = model.loss(x0[first : first + n], labels[first : first + n], 0.3, seed=7, step=8, first_row=first)
            parts, first = parts + part.loss * n / 24, first + n
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=0)
        check_gradients(model, parts, whole)


def test_draws_follow_seed_and_step_and_these_may_be_tensors():
    model, x0 = make_model(), samples(8)

    def loss(seed, step, progress=0.3):
        return model.loss(x0, torch.zeros(8, dtype=torch.int64), progress, seed=seed, step=step).loss.item()

    assert loss(1, 2) == loss(torch.tensor(1), torch.tensor(2), torch.tensor(0.3))
    assert len({loss(1, 2), loss(1, 3), loss(2, 2), loss(2**33 + 1, 2)}) == 4


# ------------------------------------------------------------------------------------------------------------ times


def test_times_are_logit_normal():
    model = make_model(velocity_share=0.5, time_mean=(-0.2, -1.0, 0.2), time_std=(1.0, 0.8, 0.5))
    t, s, gap = model.draw_times(torch.arange(40000), 20000, 0.0, 0, 0)
    assert t.dtype == s.dtype == gap.dtype == torch.float32
    free = s < t[20000:] - 2e-4
    for times, mean, std in ((t[:20000], -0.2, 1.0), (t[20000:], 0.2, 0.5)):
        logits = torch.logit(times.double())
        assert logits.mean().item() == pytest.approx(mean, abs=0.03)
        assert logits.std().item() == pytest.approx(std, rel=0.03)
    assert free.float().mean() > 0.8
    assert (s >= 0).all()
    assert (s <= t[20000:] - 0.99e-4).all()
    assert (t >= 1e-4).all()


@pytest.mark.parametrize(("progress", "ratio"), [(0.0, 0.1), (1.0, 0.002)])
@pytest.mark.parametrize("min_gap", [0.0, 1e-4, 0.05])
def test_gap_is_a_share_of_the_interval_within_bounds(progress, ratio, min_gap):
    model = make_model(min_gap=min_gap)
    t, s, gap = model.draw_times(torch.arange(20000), 0, progress, 0, 0)
    interval = (t - s).double()
    expected = torch.minimum((interval * ratio).clamp(min=min_gap), interval)
    torch.testing.assert_close(gap.double(), expected, rtol=1e-6, atol=0)
    assert (gap > 0).all()
    if (progress, min_gap) == (1.0, 1e-4):
        assert (gap > 1.01 * ratio * (t - s)).float().mean().item() == pytest.approx(0.2, abs=0.03)


def test_a_time_s_after_t_is_moved_just_before_it():
    model = make_model(time_mean=(0.0, 3.0, -3.0), time_std=(0.0, 0.0, 0.0))
    t, s, gap = model.draw_times(torch.arange(4), 2, 0.5, 0, 0)
    sigmoid = 1 / (1 + math.exp(3))
    torch.testing.assert_close(t, torch.tensor([0.5, 0.5, sigmoid, sigmoid]), rtol=1e-6, atol=0)
    torch.testing.assert_close(s, torch.full((2,), sigmoid - 1e-4), rtol=1e-6, atol=0)
    torch.testing.assert_close(gap, torch.full((2,), 1e-4), rtol=1e-3, atol=0)
    early = make_model(time_mean=(0.0, 0.0, -20.0), time_std=(0.0, 0.0, 0.0)).draw_times(torch.arange(2), 0, 0.5, 0, 0)
    torch.testing.assert_close(early.t, torch.full((2,), 1e-4), rtol=1e-6, atol=0)
    assert not early.s.any()
