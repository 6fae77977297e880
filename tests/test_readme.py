"""The README's Python runs as it stands, on a smaller network."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import yaml
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from test_frozen import LowRank
from test_interop import CIFAR10
from torch import nn
from torch.utils.data import TensorDataset

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
    _, loss, fast, trained, own, _ = _blocks("python")
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


def _inject(config, network):
    """Stands in for peft's: beside each of the layers that are named, one of low rank that begins with 0."""
    for name, layer in list(network.named_modules()):
        if name.endswith(tuple(config.target_modules)):
            adapted = LowRank(layer)
            nn.init.zeros_(adapted.up.weight)
            network.set_submodule(name, adapted)


def _transformer(*_, torch_dtype, **__):
    sizes = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "pos_embed_max_size": 8}
    widths = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 6}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SD3Transformer2DModel(sample_size=8, in_channels=4, out_channels=4, **sizes, **widths)
    return network.to(torch_dtype).eval()


def test_the_large_network_of_the_readme_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peft = ModuleType("peft")
    peft.LoraConfig, peft.inject_adapter_in_model = SimpleNamespace, _inject
    monkeypatch.setitem(sys.modules, "peft", peft)
    monkeypatch.setattr(SD3Transformer2DModel, "from_pretrained", _transformer)
    block = _blocks("python")[-1]
    small = {"154, 4096, 2048": "3, 12, 6", '"in_channels": 16, "input_size": 128': '"in_channels": 4, "input_size": 8'}
    small |= {'"accumulation": 8}': '"accumulation": 2}, "total_steps": 2, "device": "cpu"', "64,": "8,"}
    small |= {'"save_frozen": False': '"save_frozen": False, "sample_every": 0'}
    for theirs, ours in small.items():
        assert theirs in block
        block = block.replace(theirs, ours)
    x, told = (torch.randn(8, *shape, generator=torch.Generator().manual_seed(0)) for shape in ((4, 8, 8), (42,)))
    names = {"latents_and_texts": TensorDataset(x, told)}
    exec(block, names)
    (saved,) = Path("runs/lora/checkpoints").iterdir()
    averages = load_file(saved / "ema.safetensors")
    assert any("to_q.up" in name for name in averages)
    assert not any(".own." in name for name in averages)
    found = names["model"].state_dict()
    assert all(torch.equal(found[name], value) for name, value in averages.items())
    t = torch.full((8,), 0.5)
    with torch.no_grad():
        net = names["Net"]()
        before = net(x, t, t, told)
        assert torch.equal(net(x, t, 0.3 * t, told), before)
        low = x.bfloat16(), told[:, :36].bfloat16().unflatten(1, (3, 12)), told[:, 36:].bfloat16()
        velocity = _transformer(torch_dtype=torch.bfloat16)(*low, 1000 * t, return_dict=False)[0]
    torch.testing.assert_close(before, velocity, rtol=0.02, atol=0.02)


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
