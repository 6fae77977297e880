"""Training with a torch optimizer of the user's, given as a function or named by its import path."""

import json
from collections import deque
from dataclasses import replace
from functools import partial

import pytest
import torch
from runs import StopError, assert_bitwise_equal, final, refused, stop_at, tiny_config, write_config

from soflow_fast import Trainer, run_optimizer
from soflow_fast.cli import main
from soflow_fast.config import OptimizerConfig
from soflow_fast.optim import AdamW
from soflow_fast.run_optimizer import RunOptimizer


def _grouped(named, lr):
    """Weight decay for matrices alone, and ten times the learning rate for the rest."""
    groups = [[(name, p) for name, p in named if (p.ndim >= 2) == matrices] for matrices in (True, False)]
    options = ({"weight_decay": 0.1}, {"lr": 10 * lr})
    return torch.optim.SGD(
        [{"params": group, **option} for group, option in zip(groups, options, strict=True)], lr=lr, momentum=0.9
    )


def _config(folder, name="adamw", **changes):
    return tiny_config(folder, optimizer=OptimizerConfig(name=name, learning_rate=1e-3, **changes))


def test_a_run_with_groups_of_parameters_goes_on_exactly(tmp_path, monkeypatch):
    schedule = {"schedule": "linear", "final_share": 0.5}
    whole = Trainer(_config(tmp_path / "whole", **schedule), optimizer=_grouped)
    whole.fit()
    low, high = (group["lr"] for group in whole.optimizer.param_groups)
    assert low == whole.config.optimizer.learning_rate_at(5, 6) < 1e-3
    assert high == pytest.approx(10 * low)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StopError):
            Trainer(_config(tmp_path / "parts", **schedule), optimizer=_grouped).fit()
    Trainer(_config(tmp_path / "parts", **schedule), optimizer=_grouped).fit()
    assert_bitwise_equal(final(tmp_path / "whole"), final(tmp_path / "parts"))
    assert any(state["momentum_buffer"].any() for state in final(tmp_path / "parts").optimizer["state"].values())


def test_one_named_by_its_import_path_is_the_one_given(tmp_path):
    Trainer(_config(tmp_path / "given"), optimizer=partial(torch.optim.SGD, momentum=0.9)).fit()
    file = write_config(tmp_path / "c.yaml", _config(tmp_path / "named"))
    assert main(["train", str(file), "--optimizer.name=torch.optim.SGD", "--optimizer.init_args.momentum=0.9"]) == 0
    assert_bitwise_equal(final(tmp_path / "given"), final(tmp_path / "named"))


class _Counting(torch.optim.SGD):
    """Keeps what it needs in its groups too, as Prodigy does, and draws noise."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                p.data.add_(torch.randn_like(p), alpha=1e-3 * group["k"])
        return super().step(closure)


def test_what_an_optimizer_keeps_in_its_groups_and_draws_goes_on(tmp_path, monkeypatch):
    whole = Trainer(_config(tmp_path / "whole"), optimizer=_Counting)
    whole.fit()
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StopError):
            Trainer(_config(tmp_path / "parts"), optimizer=_Counting).fit()
    torch.manual_seed(7)
    parts = Trainer(_config(tmp_path / "parts"), optimizer=_Counting)
    parts.fit()
    assert parts.optimizer.param_groups[0]["k"] == 6
    assert_bitwise_equal(final(tmp_path / "whole"), final(tmp_path / "parts"))


def _stopped(folder, make, **changes):
    """A run of four of six steps."""
    Trainer(replace(_config(folder, **changes), total_steps=4), optimizer=make).fit()
    return replace(_config(folder, **changes), total_steps=6)


def test_a_run_goes_on_with_an_optimizer_made_otherwise_only_where_that_is_accepted(tmp_path):
    longer = _stopped(tmp_path, partial(torch.optim.SGD, momentum=0.9))
    assert len(final(tmp_path, 4).optimizer["made"]["groups"][0]["parameters"]) > 10
    slower = partial(torch.optim.SGD, momentum=0.5)
    with pytest.raises(ValueError, match=r"with optimizer group 0 momentum 0.9, and this one has 0.5; make it as"):
        Trainer(replace(longer, total_steps=4), optimizer=slower).fit()
    run = Trainer(longer, optimizer=slower, accept_changes=True)
    run.fit()
    assert run.optimizer.param_groups[0]["momentum"] == 0.5
    changes = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
    found = {"step": 4, "key": "optimizer group 0 momentum", "before": 0.9, "after": 0.5}
    assert found in changes


@pytest.mark.parametrize("second", [torch.optim.AdamW, None])
def test_another_optimizer_begins_anew(tmp_path, second):
    longer = _stopped(tmp_path, torch.optim.SGD)
    with pytest.raises(ValueError, match="go on with --accept-changes"):
        Trainer(longer, optimizer=second).fit()
    Trainer(longer, optimizer=second, accept_changes=True).fit()
    assert {float(state["step"]) for state in final(tmp_path).optimizer["state"].values()} == {2.0}
    changes = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
    (change,) = [change for change in changes if change["key"] in ("optimizer", "optimizer.name")]
    assert change["before"] == ("torch.optim.sgd.SGD of [25] parameters" if second else "given")
    assert change["after"] == ("torch.optim.adamw.AdamW of [25] parameters, begun anew" if second else "adamw")


def test_an_accepted_change_stays_accepted_before_the_next_checkpoint(tmp_path, monkeypatch):
    longer = _stopped(tmp_path, partial(torch.optim.SGD, momentum=0.9))
    slower = partial(torch.optim.SGD, momentum=0.5)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(StopError):
            Trainer(longer, optimizer=slower, accept_changes=True).fit()
    run = Trainer(longer, optimizer=slower)
    run.fit()
    assert run.optimizer.param_groups[0]["momentum"] == 0.5


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_groups_of_the_librarys_optimizer_are_compared_too(tmp_path, monkeypatch, impl):
    """Made by a function its values are not in the configuration."""

    def make(named, lr, weight_decay=0.0):
        groups = [[p for _, p in named if (p.ndim >= 2) == matrices] for matrices in (True, False)]
        return AdamW([{"params": group, "weight_decay": weight_decay} for group in groups], lr=lr, impl=impl)

    Trainer(_config(tmp_path / "whole"), optimizer=make).fit()
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(StopError):
            Trainer(_config(tmp_path / "parts"), optimizer=make).fit()
    with pytest.raises(ValueError, match=r"optimizer group 0 weight_decay 0.0, and this one has 0.5"):
        Trainer(_config(tmp_path / "parts"), optimizer=partial(make, weight_decay=0.5)).fit()
    Trainer(_config(tmp_path / "parts"), optimizer=make).fit()
    assert_bitwise_equal(final(tmp_path / "whole"), final(tmp_path / "parts"))


def test_a_dry_run_tells_of_another_optimizer(tmp_path, capsys):
    file = write_config(tmp_path / "c.yaml", _config(tmp_path / "run", "torch.optim.SGD"))
    assert main(["train", str(file)]) == 0
    record = tmp_path / "run" / "optimizer.json"
    assert main(["train", str(file), "--dry-run"]) == 0
    record.write_text(record.read_text().replace('"nesterov": false', '"nesterov": true'))
    capsys.readouterr()
    assert "with optimizer group 0 nesterov True, and this one has False" in refused(capsys, "train", file, "--dry-run")


def with_rate_in_a_tensor(named, lr):
    (last,) = [p for name, p in named if "blocks.1.attn.proj.bias" in name]
    rest = [p for _, p in named if p is not last]
    return torch.optim.AdamW([{"params": rest}, {"params": [last]}], lr=torch.tensor(lr), fused=True)


def test_a_dry_run_of_an_optimizer_that_looks_for_a_block(tmp_path, capsys):
    config = _config(tmp_path / "run", f"{__name__}.with_rate_in_a_tensor")
    file = write_config(tmp_path / "c.yaml", replace(config, model=replace(config.model, depth=2)))
    for arguments in (["--dry-run"], [], ["--dry-run"]):
        assert main(["train", str(file), *arguments]) == 0


class _Drawing(torch.optim.SGD):
    def step(self, closure=None):
        before = torch.rand(())
        super().step(closure)
        self.drawn = [before, torch.rand(())]


def test_all_processes_update_alike_and_their_networks_draw_apart(tmp_path):
    """Also where the classes of an optimizer call each other's step, and the base has been made before."""
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    drawn = []
    for rank in (0, 1):
        run = Trainer(_config(tmp_path), optimizer=_Drawing)
        with run._of_run.draws(seed=0, step=3, rank=rank, world_size=2):
            of_network = torch.rand(())
            run.optimizer.step()
        drawn.append((of_network, *run.optimizer.drawn))
    (network0, *update0), (network1, *update1) = drawn
    assert len({network0.item(), network1.item(), update0[0].item()}) == 3
    assert update0 == update1
    assert update0[0] != update0[1]


def test_a_state_goes_where_the_machine_of_now_needs_it(tmp_path):
    """Of an optimizer that was not capturable in one that is, which is no change."""
    run = Trainer(_config(tmp_path), optimizer=torch.optim.AdamW)
    run.fit()
    state = run._of_run.state_dict()
    meta = torch.nn.Linear(2, 2, device="meta")
    capturable = torch.optim.AdamW(meta.parameters(), lr=1e-3, capturable=True, foreach=False)
    other = RunOptimizer(capturable, meta, run.config.optimizer)
    state["made"]["groups"][0]["parameters"] = other.made["groups"][0]["parameters"]
    assert run_optimizer.changes(state["made"], other.made) == []
    moments = {"step": torch.tensor(6.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    groups = [{**state["param_groups"][0], "params": [0, 1]}]
    other.load_state_dict({**state, "state": {0: dict(moments), 1: dict(moments)}, "param_groups": groups})
    assert capturable.param_groups[0]["capturable"]
    assert {one["step"].device.type for one in capturable.state.values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_capturable_optimizer_trains_in_a_graph(tmp_path):
    def make(named, lr):
        return torch.optim.AdamW(named, lr=torch.tensor(lr, device="cuda"), capturable=True)

    run = Trainer(replace(_config(tmp_path), device="cuda", total_steps=8), optimizer=make)
    assert run.step.cuda_graph
    run.fit()
    assert {float(state["step"]) for state in final(tmp_path, 8).optimizer["state"].values()} == {8.0}


def test_another_optimizer_begins_anew_in_every_fit(tmp_path, monkeypatch):
    run = Trainer(_stopped(tmp_path, torch.optim.SGD), optimizer=torch.optim.AdamW, accept_changes=True)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(StopError):
            run.fit()
    run.fit()
    assert {float(state["step"]) for state in final(tmp_path).optimizer["state"].values()} == {2.0}


class _ManyDtypes(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["count"] = state.get("count", torch.tensor(2**40)) + 1
            state["slow"] = {
                "mean": state.get("slow", {"mean": torch.zeros_like(p).double()})["mean"].lerp(p.double(), 0.3)
            }
            p.data.sub_(state["slow"]["mean"], alpha=1e-3)


def test_a_state_keeps_its_dtypes(tmp_path, monkeypatch):
    Trainer(_config(tmp_path / "whole"), optimizer=_ManyDtypes).fit()
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StopError):
            Trainer(_config(tmp_path / "parts"), optimizer=_ManyDtypes).fit()
    Trainer(_config(tmp_path / "parts"), optimizer=_ManyDtypes).fit()
    whole, parts = (final(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(value, parts.model[name]) for name, value in whole.model.items())
    assert all(int(state["count"]) == 2**40 + 6 for state in parts.optimizer["state"].values())


def test_an_empty_group_of_the_librarys_optimizer(tmp_path):
    def make(named, lr):
        return AdamW([{"params": []}, {"params": [p for _, p in named]}], lr=lr, impl="triton")

    Trainer(_config(tmp_path / "groups"), optimizer=make).fit()
    Trainer(_config(tmp_path / "plain")).fit()
    groups, plain = (final(tmp_path / name).model for name in ("groups", "plain"))
    assert all(torch.allclose(value, plain[name], atol=1e-5) for name, value in groups.items())


def test_parameters_in_another_order_are_noticed(tmp_path):
    def turned(named, lr):
        return torch.optim.SGD(named[::-1], lr=lr, momentum=0.9)

    longer = _stopped(tmp_path, partial(torch.optim.SGD, momentum=0.9))
    with pytest.raises(
        ValueError,
        match=r"a run with optimizer 'torch.optim.sgd.SGD of \[25\] parameters', and .* in another order, begun anew",
    ):
        Trainer(replace(longer, total_steps=4), optimizer=turned).fit()


class _Keeping(torch.optim.SGD):
    """Its state is what ``keep`` makes."""

    def __init__(self, named, lr, keep):
        super().__init__(named, lr=lr)
        self.keep = keep

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["kept"] = self.keep()


def test_a_state_that_would_not_come_back_is_noticed_at_once(tmp_path):
    for keep, sentence in (
        (deque, r"does not give back the state of the optimizer _Keeping \(collections\.deque\); keep tensors"),
        (lambda: lambda: 0, r"does not give back the state of the optimizer _Keeping \(Can't pickle"),
        (lambda: "text", "the state of the optimizer _Keeping holds a text"),
    ):
        run = Trainer(_config(tmp_path), optimizer=partial(_Keeping, keep=keep))
        with pytest.raises(ValueError, match=sentence) as error:
            run.fit()
        assert "\n" not in str(error.value)
    Trainer(_config(tmp_path), optimizer=partial(_Keeping, keep=lambda: {"a": [torch.ones(2), 1]})).fit()


def test_torchs_adamw_is_the_librarys(tmp_path):
    Trainer(_config(tmp_path / "own")).fit()
    arguments = {"betas": [0.9, 0.99], "weight_decay": 0.0, "fused": True}
    config = _config(tmp_path / "torch", "torch.optim.AdamW", init_args=arguments)
    Trainer(replace(config, max_skipped_steps=1)).fit()  # which a fused one can leave out
    assert_bitwise_equal(final(tmp_path / "own"), final(tmp_path / "torch"))


def test_a_learning_rate_in_a_tensor_stays_in_it(tmp_path):
    kept = torch.tensor(1.0)

    def make(named, lr):
        return torch.optim.AdamW(named, lr=kept.fill_(lr), fused=True)

    run = Trainer(_config(tmp_path, schedule="cosine"), optimizer=make)
    run.fit()
    assert run.optimizer.param_groups[0]["lr"] is kept
    assert float(kept) == pytest.approx(run.config.optimizer.learning_rate_at(5, 6))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "adam"}, r"optimizer.name='adam' is not known; choose one of adamw, radam, given, or package"),
        ({"init_args": {"momentum": 1}}, r"optimizer.init_args=.* does nothing with 'adamw'"),
        ({"name": "torch.optim.SGD", "betas": (0.9, 0.9)}, r"optimizer.betas=\(0.9, 0.9\) does nothing with"),
        (
            {"name": "torch.optim.SGD", "init_args": {"lr": 1}},
            r"init_args has lr=1; give it as optimizer.learning_rate",
        ),
        ({"name": "torch.optim.Muonic"}, r"optimizer.name='torch.optim.Muonic' cannot be imported"),
        (
            {"name": "torch.optim.SGD", "init_args": {"m": 1}},
            "cannot be called with .*unexpected keyword argument 'm'",
        ),
        ({"name": "unittest.mock.Mock"}, "makes an object of class Mock; make a torch.optim.Optimizer"),
        ({"name": "given"}, r"made by a function given to the Trainer; give it again, or its import path"),
    ],
)
def test_refused_settings(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        Trainer(_config(tmp_path, **changes))
    assert "\n" not in str(error.value)


def _without_rate(named, lr):
    optimizer = torch.optim.SGD(named, lr=lr)
    optimizer.param_groups[0]["lr"] = None
    return optimizer


def test_refused_objects(tmp_path):
    def without_the_last(named, lr):
        return torch.optim.SGD(named[:-1], lr=lr)

    with pytest.raises(ValueError, match=r"makes a SGD without the parameter network\.final_layer\.\S+; give it that"):
        Trainer(_config(tmp_path), optimizer=without_the_last)
    with pytest.raises(ValueError, match=r"max_skipped_steps=2 needs an optimizer that can leave a step out, and SGD"):
        Trainer(replace(_config(tmp_path), max_skipped_steps=2), optimizer=torch.optim.SGD)
    fused = partial(torch.optim.SGD, momentum=0.9, fused=True)  # which begins with memory that it has not written
    with pytest.raises(ValueError, match=r"max_skipped_steps=2 needs an optimizer that can leave a step out, and SGD"):
        Trainer(replace(_config(tmp_path), max_skipped_steps=2), optimizer=fused)
    with pytest.raises(ValueError, match=r"makes a LBFGS, whose step calls the loss again"):
        Trainer(_config(tmp_path), optimizer=torch.optim.LBFGS)
    with pytest.raises(ValueError, match=r"optimizer.weight_decay=0.1 does nothing with optimizer.name='given'"):
        Trainer(_config(tmp_path, weight_decay=0.1), optimizer=torch.optim.SGD)
    with pytest.raises(ValueError, match=r"makes a SGD with lr=None in a group, which the run sets"):
        Trainer(_config(tmp_path), optimizer=_without_rate)
    optimizer = torch.optim.SGD([torch.zeros(1)])
    with pytest.raises(ValueError, match=r"optimizer is an object of class SGD; give what makes one"):
        Trainer(_config(tmp_path), optimizer=optimizer)


def test_a_run_does_not_go_on_with_another_optimizer(tmp_path):
    Trainer(_config(tmp_path)).fit()
    for keywords in (
        {"config": _config(tmp_path, "torch.optim.SGD")},
        {"config": _config(tmp_path), "optimizer": _grouped},
    ):
        with pytest.raises(ValueError, match=r"holds a run with optimizer.name='adamw'"):
            Trainer(**keywords).fit()
