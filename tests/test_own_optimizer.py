"""Training with a torch optimizer of the user's, given as a function or named by its import path."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from runs import StopError, assert_bitwise_equal, final, stop_at, tiny_config, write_config

from soflow_fast import Trainer
from soflow_fast.cli import main
from soflow_fast.config import OptimizerConfig


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


def test_refused_objects(tmp_path):
    def without_the_last(named, lr):
        return torch.optim.SGD(named[:-1], lr=lr)

    with pytest.raises(ValueError, match=r"makes a SGD without the parameter network\.final_layer\.\S+; give it that"):
        Trainer(_config(tmp_path), optimizer=without_the_last)
    with pytest.raises(ValueError, match=r"max_skipped_steps=2 needs an optimizer that can leave a step out, and SGD"):
        Trainer(replace(_config(tmp_path), max_skipped_steps=2), optimizer=torch.optim.SGD)
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
