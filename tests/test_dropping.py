"""Which rows drop their label: a share of every group of rows; and the guidance that these are spared."""

import pytest
import torch
from soflow_formulas import NULL, drops, make_model, samples

from soflow_fast import SoFlow, dropping
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.paths import row_order


def _kinds(n, velocity_share, first_row=0):
    """The rows that train the velocity, and the others."""
    order, n_velocity = row_order(n, velocity_share, first_row)
    return (first_row + torch.tensor(order)).split([n_velocity, n - n_velocity])


@pytest.mark.parametrize(
    ("share", "group", "dropped"), [(0.1, 10, 1), (0.15, 20, 3), (0.4, 5, 2), (0, 1, 0), (1, 1, 1)]
)
@pytest.mark.parametrize("velocity_share", [0.75, 1.0, 0.0, 0.3])
def test_of_every_group_of_a_kind_exactly_the_share_drops(velocity_share, share, group, dropped):
    for rows in _kinds(400, velocity_share):
        drop = drops(rows, velocity_share, share, seed=1, step=2)
        whole = len(rows) // group * group
        assert (drop[:whole].view(-1, group).sum(1) == dropped).all()


def test_every_row_drops_with_the_same_probability_and_groups_independently():
    rows, steps = torch.arange(80), 4000
    drop = torch.stack([drops(rows, 0.75, 0.15, seed=3, step=step) for step in range(steps)]).double()
    assert (drop.mean(0) - 0.15).abs().max() < 4.5 * (0.15 * 0.85 / steps) ** 0.5
    velocity, _ = _kinds(80, 0.75)
    of_two_groups = drop[:, velocity[:20]].T @ drop[:, velocity[20:40]] / steps
    assert (of_two_groups - 0.15**2).abs().max() < 5 * (0.15**2 / steps) ** 0.5


def test_a_row_drops_whatever_the_batch_is_split_into():
    rows = torch.arange(64)
    whole = drops(rows, 0.75, 0.1, seed=5, step=6)
    parts = [drops(part, 0.75, 0.1, seed=5, step=6) for part in (rows[:7], rows[7:30].flip(0), rows[30:])]
    assert torch.equal(whole, torch.cat([parts[0], parts[1].flip(0), parts[2]]))
    assert not torch.equal(whole, drops(rows, 0.75, 0.1, seed=5, step=7))


@pytest.mark.parametrize(
    ("share", "n", "expected"), [(0.1, 192, 18), (0.1, 64, 5), (0.1, 18, 0), (0.1, 19, 1), (0, 9, 0)]
)
def test_so_many_drop_at_least(share, n, expected):
    assert dropping.fewest(n, share) == expected
    found = set()
    for first in range(120):
        rows = first + torch.arange(n)
        drop = drops(rows, 1.0, share, seed=first, step=0)
        found.add(drop.sum().item())
        kept = dropping.to_guide(drop, share)
        assert len(kept) == n - expected
        assert set((~drop).nonzero()[:, 0].tolist()) <= set(kept.tolist())
    assert min(found) >= expected


@pytest.mark.parametrize("objective", [SoFlow, MeanFlow])
def test_spared_guidance_changes_nothing(objective, monkeypatch):
    """The loss, its gradient and every row's error; and the rows that the network is asked for."""
    settings = {"p": 0.7} if objective is SoFlow else {"guidance_mix": 0.4}
    model = make_model(objective=objective, label_drop=0.1, **settings)
    x0, labels = samples(100), torch.arange(100) % NULL
    asked = []

    def record(_, inputs):
        if not torch.is_grad_enabled():
            asked.append(len(inputs[0]))

    def loss():
        asked.clear()
        with model.network.register_forward_pre_hook(record):
            out = model.loss(x0, labels, 0.3, seed=4, step=5)
        return out, torch.autograd.grad(out.loss, list(model.parameters())), asked[0]

    (out, gradient, rows), spared = loss(), 6 + 2 * 1
    assert rows == 125 - spared
    monkeypatch.setattr(dropping, "fewest", lambda n, share: 0)
    (expected, expected_gradient, rows) = loss()
    assert rows == 125
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


def test_a_row_that_is_wrongly_spared_shows(monkeypatch):
    """As where the rows given do not follow each other."""
    model = make_model(label_drop=0.1)
    monkeypatch.setattr(dropping, "fewest", lambda n, share: n // 2)
    assert model.loss(samples(40), torch.arange(40) % NULL, 0.3, seed=4, step=5).loss.isnan()


def test_an_objective_with_draws_of_its_own_is_spared_nothing():
    class Never(SoFlow):
        def draw_drop(self, rows, labels, seed, step):
            return torch.zeros_like(rows, dtype=torch.bool)

    model = make_model(objective=Never, label_drop=0.1)
    assert model.loss(samples(100), torch.arange(100) % NULL, 0.3, seed=4, step=5).loss.isfinite()


def test_along_its_own_prediction_meanflow_needs_all():
    model = make_model(objective=MeanFlow, label_drop=0.1, direction="prediction", p=1.0, guidance_mix=0.0)
    assert model.loss(samples(100), torch.arange(100) % NULL, 0.3, seed=4, step=5).loss.isfinite()
