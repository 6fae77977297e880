"""Runs that go on with other parameters trained than before."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from runs import Blobs, StopError, files, final, stop_at, tiny_config
from torch import nn

from soflow_fast import Trainer, load_run, posthoc
from soflow_fast.config import EMAConfig, OptimizerConfig
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.optim import AdamW
from soflow_fast.run_optimizer import RunOptimizer


class _Net(nn.Module):
    """Two convolutions of the same shape, a and b, and a table of another."""

    num_classes = 10

    def __init__(self, *frozen):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b = (nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(2))
            self.table = nn.Embedding(11, 1)
        for name in frozen:
            self.get_submodule(name).requires_grad_(False)

    def forward(self, x, t, s, labels):
        return self.b(torch.tanh(self.a(x) + self.table(labels)[:, :, None, None] + t[:, None, None, None]))


def _trainer(folder, *frozen, posthoc=(), **keywords):
    config = tiny_config(folder, ema=EMAConfig(posthoc=posthoc, snapshot_every=1))
    config = replace(config, output=replace(config.output, checkpoint_every=4))
    return Trainer(config, model=FlowMatching(_Net(*frozen)), dataset=Blobs(), **keywords)


def _stopped(folder, monkeypatch, *frozen, **keywords):
    """A run of four of six steps."""
    run = _trainer(folder, *frozen, **keywords)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(StopError):
            run.fit()
    return run


def _moments(run):
    """Of the parameters that have a state, by name: the steps that it counts and the first moment."""
    named = ((name, run.optimizer.state.get(p)) for name, p in run.model.named_parameters())
    return {name: (float(state["step"]), state["exp_avg"].clone()) for name, state in named if state}


A, B, TABLE = "network.a.weight", "network.b.weight", "network.table.weight"


@pytest.mark.parametrize(
    ("before", "after", "were", "are"),
    [
        (["a"], [], f"2 without {A}", f"3 with {A}"),
        ([], ["a", "table"], f"3 with {A} and 1 more", f"1 without {A} and 1 more"),
        (["a"], ["b"], f"2 with {B}", f"2 with {A}"),
    ],
)
def test_a_run_goes_on_with_other_parameters_by_name_where_that_is_accepted(
    tmp_path, monkeypatch, before, after, were, are
):
    trained = _moments(_stopped(tmp_path, monkeypatch, *before))
    there = files(tmp_path)
    with pytest.raises(ValueError, match=f"a run with trained parameters '{were}', and this one has '{are}'; make it"):
        _trainer(tmp_path, *after).fit()
    assert files(tmp_path) == there
    run = _trainer(tmp_path, *after, accept_changes=True)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(StopError):
            run.fit()
    kept = trained.keys() & run.ema.averages.keys()
    loaded = _moments(run)
    assert loaded.keys() == kept
    assert all(loaded[one][0] == 4 and torch.equal(loaded[one][1], trained[one][1]) for one in kept)
    _trainer(tmp_path, *after).fit()  # the changed run is now the run
    (change,) = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
    assert change == {"step": 4, "key": "trained parameters", "before": were, "after": are}
    steps = {float(state["step"]) for state in final(tmp_path).optimizer["state"].values()}
    assert steps == {6.0 if one in kept else 2.0 for one in run.ema.averages}


def test_averages_of_parameters_that_are_thawed_and_frozen(tmp_path, monkeypatch):
    """One that was not trained begins with its weight; one that is not any more is its weight."""
    _stopped(tmp_path, monkeypatch, "table")
    run = _trainer(tmp_path, "a", accept_changes=True)
    run.fit()
    state = final(tmp_path)
    assert torch.equal(state.ema[A], state.model[A])
    drift = (state.ema[TABLE] - _Net().table.weight).abs().max()
    assert 0 < drift < (state.model[TABLE] - _Net().table.weight).abs().max()


def test_the_fused_update_goes_on_as_torchs():
    """The bias of a parameter that is trained since is corrected by a step count of its own."""
    results = []
    for impl in ("torch", "triton"):
        states = []
        for frozen in (["a"], []):
            net = _Net(*frozen)
            optimizer = AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, impl=impl)
            run = RunOptimizer(optimizer, net, OptimizerConfig(learning_rate=1e-2))
            for state in states:
                run.load_state_dict(state)
            for step in range(3):
                for number, p in enumerate(net.parameters()):
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + number))
                optimizer.update()
            states.append(run.state_dict())
        results.append([p.detach() for p in net.parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)


def test_an_optimizer_of_the_users_names_the_parameter_and_begins_anew(tmp_path, monkeypatch):
    make = partial(torch.optim.SGD, momentum=0.9)
    _stopped(tmp_path, monkeypatch, "a", optimizer=make)
    with pytest.raises(ValueError, match=f"trained parameters '2 with {B}', and this one has '2 with {A}'"):
        _trainer(tmp_path, "b", optimizer=make).fit()
    _trainer(tmp_path, "b", optimizer=make, accept_changes=True).fit()
    keys = [json.loads(line)["key"] for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
    assert keys == ["trained parameters", "optimizer"]


def test_further_averages_and_other_parameters(tmp_path, monkeypatch):
    """An average by a power of time is of the whole training, and a snapshot of what was trained."""
    tracked = (0.05, 0.1)
    _stopped(tmp_path / "thawed", monkeypatch, "a", posthoc=tracked)
    there = files(tmp_path / "thawed")
    with pytest.raises(ValueError, match=f"^ema.posthoc has 0.05, and {A} was not trained, so not averaged, from the"):
        _trainer(tmp_path / "thawed", posthoc=tracked, accept_changes=True).fit()
    assert files(tmp_path / "thawed") == there
    _trainer(tmp_path / "thawed", accept_changes=True).fit()  # without them

    _stopped(tmp_path / "frozen", monkeypatch, posthoc=tracked)
    run = _trainer(tmp_path / "frozen", "a", posthoc=tracked, accept_changes=True)
    run.fit()
    assert posthoc.reconstruct(tmp_path / "frozen", 0.1).weights.keys() == {B, TABLE}
    _, model, _ = load_run(tmp_path / "frozen", "cpu", model=FlowMatching(_Net()), ema_std=0.1)
    assert torch.equal(model.network.a.weight, run.model.network.a.weight)
