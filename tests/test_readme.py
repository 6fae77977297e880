"""The README's Python runs as it stands, on a smaller network."""

import re
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from test_interop import CIFAR10

from soflow_fast import DiT, SoFlow, TrainConfig

README = Path(__file__).parents[1] / "README.md"


class _Samples(torch.utils.data.Dataset):
    """Eight samples of a class each."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.full((1, 8, 8), i / 8), i % 3


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
        "my_dataset": _Samples(),
        "x0": x0,
        "noise": noise,
        "labels": labels,
        "progress": 0.5,
        "step": 7,
        "batches": [(x0, labels), (x0, labels)],
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks[:2]:
        exec(block.replace("DiT-B/4", "DiT-S/4"), names)
    assert names["loss"].isfinite()
    assert names["images"].shape == x0.shape
    assert names["stats"].finite
    names |= {"noise": noise[:3, :1, :8, :8], "labels": labels[:3]}
    exec(blocks[2], names)
    trained = names["model"].network
    torch.save({"ema": {name: value + 1 for name, value in trained.state_dict().items()}}, "weights.pt")
    before = trained.final_layer.linear.bias.clone()
    exec(blocks[3], names)
    assert torch.equal(trained.final_layer.linear.bias, before + 1)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["digits", "given"]
    exec(blocks[4], names)
    net, model_config = names["Net"](), names["config"].model
    images = torch.randn(8, model_config.in_channels, 8, 8, generator=generator)
    objective = SoFlow(net)
    objective.loss(images, torch.arange(8), progress=0.5, seed=0, step=0).loss.backward()
    assert not objective.needs_float32  # its difference forward could be derived
    assert all(p.grad.any() for p in net.parameters())
    assert net.num_classes == model_config.num_classes


def test_the_configurations_of_the_readme_are_read():
    own, flowers, cifar10 = (
        TrainConfig.from_dict(yaml.safe_load(block))
        for block in re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
    )
    assert (own.model.init_args, own.data.kind) == ({"width": 128}, "my_package.Photos")
    assert (flowers.data.kind, flowers.ema.posthoc) == ("folder", (0.05, 0.1))
    published = TrainConfig.from_dict(yaml.safe_load(CIFAR10))
    without_effect = {name: getattr(cifar10.soflow, name) for name in ("guidance_mix", "guidance_decay_time")}
    published.soflow = replace(published.soflow, **without_effect)  # at a guidance scale of 1
    same = ("model", "soflow", "optimizer", "batch_size", "total_steps")
    assert [getattr(cifar10, name) for name in same] == [getattr(published, name) for name in same]
    assert cifar10.data.augment == published.data.augment
