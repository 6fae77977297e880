"""Training with an optimizer of the user's that is made of others."""

import pytest
import torch
from runs import StopError, final, stop_at, tiny_config

from soflow_fast import Trainer
from soflow_fast.config import OptimizerConfig


class _Both(torch.optim.Optimizer):
    """One for matrices and one for the rest; its state_dict has a form of its own."""

    def __init__(self, named, lr):
        matrices, rest = ([p for _, p in named if (p.ndim >= 2) == wanted] for wanted in (True, False))
        super().__init__([*matrices, *rest], {"lr": lr})
        self.parts = torch.optim.SGD(matrices, lr=10 * lr, momentum=0.9), torch.optim.AdamW(rest, lr=lr)
        self._join()

    def _join(self):
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self._join()


def _trainer(folder):
    optimizer = OptimizerConfig(learning_rate=1e-3, schedule="linear", final_share=0.5)
    return Trainer(tiny_config(folder, objective="flow_matching", optimizer=optimizer), optimizer=_Both)


def test_a_run_goes_on_exactly(tmp_path, monkeypatch):
    _trainer(tmp_path / "whole").fit()
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StopError):
            _trainer(tmp_path / "parts").fit()
    run = _trainer(tmp_path / "parts")
    run.fit()
    low = run.config.optimizer.learning_rate_at(5, 6)
    assert [part.param_groups[0]["lr"] for part in run.optimizer.parts] == pytest.approx([10 * low, low])
    whole, parts = (final(tmp_path / name).model for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_a_state_that_leaves_out_that_of_the_others_is_noticed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(_Both, "state_dict", torch.optim.Optimizer.state_dict)
    sentence = (
        r"^state_dict\(\) of the optimizer _Both leaves out a state of those in it, SGD, AdamW; have it return all"
    )
    with pytest.raises(ValueError, match=sentence):
        _trainer(tmp_path).fit()
