"""The README's Python runs as it stands, on a smaller network."""

import re
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from test_interop import CIFAR10

from soflow_fast import DiT, SoFlow, TrainConfig
from soflow_fast.build import build_model
from soflow_fast.layers import DataPrediction

README = Path(__file__).parents[1] / "README.md"


class _Samples(torch.utils.data.Dataset):
    """Eight samples of a class each."""

    def __init__(self, shape):
        self.shape = shape

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.full(self.shape, i / 8), i % 3


def _settings(folder):
    return {
        "run_dir": str(folder),
        "batch_size": 8,
        "total_steps": 2,
        "device": "cpu",
        "model": {
            "input_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 3, "hidden_size": 16, "depth": 1,
            "num_heads": 2,
        },
        "output": {"sample_every": 0},
    }  # fmt: skip


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_network_of_the_readme_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = _blocks("python")[0]
    assert "10_000" in block
    names = {"my_dataset": _Samples((3, 32, 32))}
    exec(block.replace("10_000", "2, 'batch_size': 8, 'device': 'cpu', 'output': {'sample_every': 0}"), names)
    assert sorted(path.name for path in Path("runs/mine/checkpoints").iterdir()) == ["step-00000002"]
    net = names["Net"]()
    assert net.num_classes == names["config"].model.num_classes
    objective = SoFlow(net)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    objective.loss(images, torch.arange(8), progress=0.5, seed=0, step=0).loss.backward()
    assert not objective.needs_float32  # its difference forward could be derived
    assert all(p.grad.any() for p in net.parameters())


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = _settings("runs/digits") | {"data": {"kind": "digits"}}
    digits["model"] |= {"num_classes": 10}
    Path("imagenet.yaml").write_text(yaml.safe_dump(digits))
    Path("given.yaml").write_text(yaml.safe_dump(_settings("runs/given")))
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 4, 32, 32, generator=generator)
    labels = torch.arange(4)
    names = {
        "config": TrainConfig.from_yaml("given.yaml"),
        "my_network": DiT(8, 4, 1, 16, 1, 2, num_classes=3),
        "my_dataset": _Samples((1, 8, 8)),
        "x0": x0,
        "noise": noise,
        "labels": labels,
        "progress": 0.5,
        "step": 7,
        "batches": [(x0, labels), (x0, labels)],
    }
    _, loss, fast, trained, own = _blocks("python")
    for block in (loss, fast):
        exec(block.replace("DiT-B/4", "DiT-S/4"), names)
    assert names["loss"].isfinite()
    assert names["images"].shape == x0.shape
    assert names["stats"].finite
    names |= {"noise": noise[:3, :1, :8, :8], "labels": labels[:3]}
    weights = names["my_network"].state_dict()
    torch.save({"ema": {name: value + 1 for name, value in weights.items()}}, "weights.pt")
    wanted = weights["final_layer.linear.bias"] + 1
    exec(trained, names)
    assert names["images"].shape == (3, 1, 8, 8)
    assert torch.equal(names["model"].network.final_layer.linear.bias, wanted)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["digits", "given"]
    exec(own, names)
    objective = names["Distilled"](names["my_network"], SoFlow(DiT(8, 4, 1, 16, 1, 2, num_classes=3)), guidance_scale=2)
    total = objective.loss(torch.ones(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), 0.5, step=3)
    assert {*total.parts} == {"velocity", "consistency", "robust"}
    assert total.loss.isfinite()
    assert not any("teacher" in name for name in objective.state_dict())


def test_the_configurations_of_the_readme_are_read():
    own, flowers, pixels, cifar10, imf = (TrainConfig.from_dict(yaml.safe_load(block)) for block in _blocks("yaml"))
    assert (own.optimizer.name, own.objective_args) == ("torch.optim.SGD", {"weight": 0.5})
    assert (own.model.init_args, own.data.kind) == ({"width": 128}, "my_package.Photos")
    assert (flowers.data.kind, flowers.ema.posthoc) == ("folder", (0.05, 0.1))
    with torch.device("meta"):
        net = build_model(pixels).network
        two_heads = build_model(imf).network
    assert (net.patch_size, net.input_size, type(net.prediction)) == (16, 256, DataPrediction)
    assert (two_heads.depth, two_heads.head_depth, two_heads.has_velocity_head) == (12, 8, True)
    published = TrainConfig.from_dict(yaml.safe_load(CIFAR10))
    without_effect = {name: getattr(cifar10.soflow, name) for name in ("guidance_mix", "guidance_decay_time")}
    published.soflow = replace(published.soflow, **without_effect)  # at a guidance scale of 1
    same = ("model", "soflow", "optimizer", "batch_size", "total_steps")
    assert [getattr(cifar10, name) for name in same] == [getattr(published, name) for name in same]
    assert cifar10.data.augment == published.data.augment
