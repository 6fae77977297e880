"""Networks and data sets of the user's that a configuration names by their import path."""

import random
import shutil
import sys
import traceback
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from runs import final, tiny_config, write_config, write_statistics

from soflow_fast import Trainer
from soflow_fast.cli import main
from soflow_fast.config import DataConfig, ModelConfig, TrainConfig
from soflow_fast.trainer import load_run

_MODULE = """
import random
import numpy as np
import torch
from torch import nn
from soflow_fast.objectives.meanflow import MeanFlow

class Net(nn.Module):
    num_classes = 10

    def __init__(self, width=4, reads_values=False):
        super().__init__()
        self.reads_values = reads_values
        self.times, self.label = nn.Linear(2, width), nn.Embedding(11, width)
        self.inside, self.outside = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x, t, s, labels):
        if self.reads_values:
            float(t.sum())
        told = self.times(torch.stack([t, s], 1)) + self.label(labels)
        return self.outside(nn.functional.silu(self.inside(x) + told[:, :, None, None]))

class Waves(torch.utils.data.Dataset):
    def __init__(self, n=40, path="1", shift=0.0):
        self.n, self.height = n, float(path)
        self.shift = shift + torch.rand(()) + np.random.rand() + random.random()

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.sin(torch.arange(64.) * i).view(1, 8, 8) * self.height + self.shift, i % 10

def objective(p=0.5):
    return MeanFlow(Net(), p=p)

def number():
    return 3

def mistaken():
    raise ValueError("the author's own")

class Broken(Waves):
    def __getitem__(self, i):
        raise ValueError("the author's own")

class OwnError(ValueError):
    def __init__(self, what, whose):
        super().__init__(f"the {whose}'s {what}")

class BrokenInWorkers(Waves):
    def __getitem__(self, i):
        if torch.utils.data.get_worker_info():
            raise OwnError("own", "author")
        return super().__getitem__(i)

shape = (1, 8, 8)
net = Net()
"""
_NAMES = (f"users_module_{i}" for i in count())


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module of the user's in the current folder."""
    name = next(_NAMES)
    (tmp_path / f"{name}.py").write_text(_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield name
    sys.modules.pop(name, None)


def _config(tmp_path, module, **init_args):
    model = ModelConfig(preset=f"{module}.Net", in_channels=1, input_size=8, init_args=init_args)
    data = DataConfig(kind=f"{module}.Waves", workers=0)
    return replace(tiny_config(tmp_path / "run"), model=model, data=data)


def _refused(sentence, work):
    with pytest.raises(ValueError, match=sentence) as error:
        work()
    assert "\n" not in str(error.value)


def test_a_run_is_trained_sampled_and_scored_by_commands(tmp_path, module, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # the command finds the current folder
    config = _config(tmp_path, module, width=6)
    assert main(["train", str(write_config(tmp_path / "c.yaml", config))]) == 0
    assert main(["sample", config.run_dir, "--count", "4"]) == 0
    real = write_statistics(tmp_path / "real.npz", torch.randn(250, 192).numpy())
    assert main(["eval", config.run_dir, "--count", "20", "--features", "pixels", "--reference", str(real)]) == 0
    found, model, step = load_run(config.run_dir)
    assert (step, found.model.num_classes, model.network.inside.out_channels) == (6, 10, 6)
    assert type(model.network).__module__ == module


def test_it_goes_on_where_it_stopped(tmp_path, module):
    """Also by a network and data that are drawn anew: from the seed, whatever the caller's random state is."""
    config = _config(tmp_path, module)
    Trainer(config).fit()
    whole = final(tmp_path / "run")
    again = replace(config, run_dir=str(tmp_path / "again"))
    Trainer(again).fit()
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    Trainer(TrainConfig.from_yaml(tmp_path / "again" / "config.yaml")).fit()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    for name, value in final(tmp_path / "again").model.items():
        torch.testing.assert_close(value, whole.model[name], rtol=0, atol=0)


def test_other_arguments_are_another_run_and_another_path_is_not(tmp_path, module, capsys):
    config = _config(tmp_path, module)
    file = str(write_config(tmp_path / "c.yaml", config))
    assert main(["train", file, "--data.path", "2"]) == 0
    assert main(["train", file, "--data.path", "2.0"]) == 0
    assert main(["train", file, "--model.init_args.width", "5"]) == 2
    assert "holds a run with model.init_args={}, and this one has {'width': 5}" in capsys.readouterr().err
    assert main(["train", file, "--data.path", "2", "--data.init_args.shift", "1"]) == 2
    assert "holds a run with data.init_args={}, and this one has {'shift': 1}" in capsys.readouterr().err


def test_an_objective_over_a_network(tmp_path, module):
    config = _config(tmp_path, module, p=0.25)
    config = replace(config, model=replace(config.model, preset=f"{module}.objective"))
    Trainer(config).fit()
    found, model, _ = load_run(config.run_dir)
    assert (found.objective, found.meanflow.p, model.p) == ("meanflow", 0.25, 0.25)


def test_an_object_given_takes_its_place(tmp_path, module):
    config = _config(tmp_path, module, width=6)
    net = Trainer(config).model.network
    run = Trainer(config, model=net, dataset=Trainer(config).dataset)
    assert run.model.network is net
    assert (run.config.model.preset, run.config.model.init_args, run.config.data.kind) == ("given", {}, "given")


def test_a_dry_run_counts_what_it_can(tmp_path, module, capsys):
    file = str(write_config(tmp_path / "c.yaml", _config(tmp_path, module)))
    assert main(["train", file, "--dry-run"]) == 0
    counted = capsys.readouterr().out
    assert main(["train", file, "--dry-run", "--model.init_args.reads_values", "true"]) == 0
    uncounted = capsys.readouterr().out
    assert " G per image" in counted
    assert "not known: this network cannot be called on torch's meta device" in uncounted
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("preset", "init_args", "sentence"),
    [
        ("{}.Nut", {}, "model.preset='.*.Nut' cannot be imported .AttributeError: .* no attribute 'Nut'.; give"),
        ("nowhere_at_all.Net", {}, "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("{}..Net", {}, "cannot be imported"),
        ("{}.shape", {}, "is a tuple; give a class or a function"),
        ("{}.net", {}, "is a Net; give a class or a function"),
        ("{}.number", {}, "makes an object of class int; make a torch.nn.Module"),
        ("torch.zeros", {}, "model.preset='torch.zeros' cannot be called with {}: no signature found"),
        ("{}.Net", {"depth": 3}, "='.*Net' cannot be called with {'depth': 3}: got an unexpected .* 'depth'"),
        ("torch.nn.ReLU", {}, "the network ReLU has num_classes=None; set it to the number of classes"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path, module, preset, init_args, sentence):
    config = _config(tmp_path, module)
    model = replace(config.model, preset=preset.format(module), init_args=init_args)
    _refused(sentence, lambda: Trainer(replace(config, model=model)))


def test_arguments_that_do_nothing_or_cannot_be_written_are_refused(tmp_path, module):
    config = _config(tmp_path, module)
    _refused("model.init_args={'a': 1} does nothing with 'DiT-B/4'", lambda: ModelConfig(init_args={"a": 1}))
    _refused("data.init_args={'a': 1} does nothing with 'digits'", lambda: DataConfig("digits", init_args={"a": 1}))
    _refused("cannot be kept on record as it is", lambda: replace(config.model, init_args={"a": torch.ones(1)}))
    _refused("cannot be kept on record as it is", lambda: replace(config.model, init_args={"a": (1, 2)}))
    _refused("cannot be kept on record as it is", lambda: replace(config.model, init_args={"a": {1: 2}}))
    _refused("it must be: a mapping of names to values", lambda: replace(config.model, init_args={1: 2}))
    both = {"kind": "a.B", "path": "x", "init_args": {"path": "y"}}
    _refused("data.path='x' and data.init_args both give path; leave one out", lambda: DataConfig(**both))
    _refused("model.depth=3 does nothing with .*; give it in model.init_args", lambda: replace(config.model, depth=3))


def test_why_a_module_cannot_be_imported_is_said(tmp_path, module):
    package = tmp_path / f"{module}_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text("import nowhere_at_all\n")
    config = _config(tmp_path, module)
    model = replace(config.model, preset=f"{module}_package.nets.Net")
    _refused("ModuleNotFoundError: No module named 'nowhere_at_all'", lambda: Trainer(replace(config, model=model)))


@pytest.mark.parametrize(("preset", "kind"), [("mistaken", "Waves"), ("Net", "Broken")])
def test_errors_of_the_users_own_code_keep_their_traceback(tmp_path, module, preset, kind):
    config = _config(tmp_path, module)
    config = replace(
        config,
        model=replace(config.model, preset=f"{module}.{preset}"),
        data=replace(config.data, kind=f"{module}.{kind}"),
    )
    with pytest.raises(ValueError, match=r"^the author's own$"):
        main(["train", str(write_config(tmp_path / "c.yaml", config))])


def test_an_error_of_users_code_in_a_worker_is_shown_with_its_traceback(tmp_path, module):
    config = _config(tmp_path, module)
    config = replace(config, data=DataConfig(kind=f"{module}.BrokenInWorkers", workers=1))
    with pytest.raises(ValueError, match=r"^the author's own$") as error:
        main(["train", str(write_config(tmp_path / "c.yaml", config))])
    shown = "".join(traceback.format_exception(error.value))
    assert f'{module}.py", line' in shown
    assert 'raise OwnError("own", "author")' in shown


_TEXTS = ("1", "007", "1.10", "yes", "null", "12:30", "[1,2]", "x: y", "1e-3", "1_0", "~", "", "--x")


@pytest.mark.parametrize("value", [*_TEXTS, 1e-3, 1, True, None, [1, "2"], {"class_path": "torch.nn.ReLU"}])
def test_arguments_are_what_the_file_says(tmp_path, value):
    """And not what a parser would make of a text; also after a run has recorded them."""
    config = TrainConfig(model=ModelConfig(preset="a.B", init_args={"tag": value, "__path__": 3}))
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    read = TrainConfig.from_yaml(tmp_path / "c.yaml")
    assert read.model.init_args == {"tag": value, "__path__": 3}
    assert type(read.model.init_args["tag"]) is type(value)
    assert not config.differences(read)


def test_arguments_on_the_command_line():
    raw = {"model": {"preset": "a.B", "init_args": {"width": 3, "deep": {"a": 1}}}}

    def given(*overrides):
        return TrainConfig.from_dict(raw, overrides).model.init_args

    assert given("--model.init_args.width", "64") == {"width": 64, "deep": {"a": 1}}
    assert given("--model.init_args.rate=1e-3", "--seed=3")["rate"] == 1e-3
    assert given("--model.init_args", "{width: 5}", "--model.init_args.tag", "'007'") == {"width": 5, "tag": "007"}
    assert raw["model"]["init_args"] == {"width": 3, "deep": {"a": 1}}
    _refused("--model.init_args.width has no value", lambda: given("--model.init_args.width", "--seed", "3"))
    _refused("--model.init_args.width has no value", lambda: given("--model.init_args.width"))
    _refused("give all of --model.init_args.deep", lambda: given("--model.init_args.deep.a=3"))
    _refused("it must be: a mapping of names to values", lambda: given("--model.init_args=3"))
    _refused("nearest is 'model.init_args'", lambda: given("--model.init_arg.width=3"))


def test_data_that_are_no_data_set_are_refused(tmp_path, module):
    config = _config(tmp_path, module)
    data = replace(config.data, kind=f"{module}.number")
    _refused("the data set int has no length", lambda: Trainer(replace(config, data=data)))
