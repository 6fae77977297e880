"""The UNet: its published sizes and blocks, its embedding, its difference forward, and runs of it."""

import math

import pytest
import torch
from runs import StopError, assert_bitwise_equal, final, stop_at, tiny_config
from torch.nn import functional as F

from soflow_fast import SoFlow, Trainer, UNet
from soflow_fast.augment import AUGMENT_DIM, Augment
from soflow_fast.build import build_network
from soflow_fast.config import DataConfig, ModelConfig, OutputConfig, SoFlowConfig
from soflow_fast.config_io import lists
from soflow_fast.differencing import ForwardDifference
from soflow_fast.dry_run import plan
from soflow_fast.evaluate import evaluate
from soflow_fast.images import save_samples
from soflow_fast.optim import AdamW
from soflow_fast.sample import Sampler
from soflow_fast.step import TrainStep
from soflow_fast.trainer import load_run
from soflow_fast.unet import _Block

SIZES = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attention_resolutions": (4,)}


def _network(**options):
    torch.manual_seed(0)
    form = {"input_size": 8, "in_channels": 2, "num_classes": 10, "dropout": 0.0, "augment_dim": AUGMENT_DIM}
    net = UNet(**{**form, **SIZES, **options})
    for p in net.parameters():  # whose branches start out as nearly nothing
        p.data.add_(torch.randn_like(p), alpha=0.1)
    return net


def _count(module):
    return sum(p.numel() for p in module.parameters())


def test_sizes_are_the_published_ones():
    """Weights of layers as EDM's code lists them for such blocks, and the whole of its DDPM++ for CIFAR-10, 55.7 M."""
    with torch.device("meta"):
        net = UNet(augment_dim=9)
    layers = {
        "map_augment": 1_152,
        "map_layer0": 66_048,
        "map_layer1": 262_656,
        "enc.16x16_down": 1_378_304,
        "enc.8x8_block0": 1_312_512,
        "dec.8x8_in0": 1_576_192,
        "dec.8x8_in1": 1_312_512,
        "dec.8x8_block4": 2_034_176,
        "dec.32x32_up": 1_378_304,
    }
    assert {name: _count(net.get_submodule(name)) for name in layers} == layers
    attend = [name for name, block in net.named_modules() if isinstance(block, _Block) and block.qkv is not None]
    assert attend == [f"enc.16x16_block{i}" for i in range(4)] + ["dec.8x8_in0", "dec.16x16_block4"]
    assert _count(net) - _count(net.map_layer0_s) == 55_733_891
    assert [len(net.enc), len(net.dec)] == [15, 21]


@pytest.mark.parametrize(("resample", "attends"), [(None, True), ("down", False), ("up", True)])
def test_a_block_is_its_formula(resample, attends):
    torch.manual_seed(0)
    block = _Block(8, 12 if resample is None else 8, 6, 0.0, resample=resample, attends=attends).double()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, e = torch.randn(3, 8, 4, 4).double(), torch.randn(3, 6).double()

    def normed(z, norm):
        groups = z.shape[1] // 4
        z = z.reshape(3, groups, -1)
        z = (z - z.mean(2, keepdim=True)) / (z.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return z.view(3, groups * 4, -1) * norm.weight[:, None] + norm.bias[:, None]

    def resampled(z):
        if resample == "up":
            return z.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return z if resample is None else (z[..., ::2, :] + z[..., 1::2, :]).unflatten(3, (-1, 2)).mean(4) / 2

    h = block.conv0(resampled(F.silu(normed(x, block.norm0)).view_as(x)))
    h = h + (e @ block.affine.weight.T + block.affine.bias)[:, :, None, None]
    h = block.conv1(F.silu(normed(h, block.norm1)).view_as(h))
    skipped = x if block.skip is None else block.skip(resampled(x))
    out = (skipped + h) / math.sqrt(2)
    if attends:
        c = out.shape[1]
        mixed = torch.einsum("oc,bcn->bon", block.qkv.weight[:, :, 0, 0], normed(out, block.norm2))
        mixed = mixed + block.qkv.bias[:, None]
        q, k, v = (mixed[:, j::3] for j in range(3))  # of every channel its query, key and value, one after another
        weights = torch.einsum("bcq,bck->bqk", q, k).div(math.sqrt(c)).softmax(2)
        attended = torch.einsum("bqk,bck->bcq", weights, v).reshape(out.shape)
        out = (out + block.proj(attended)) / math.sqrt(2)
    torch.testing.assert_close(block(x, e), out, rtol=1e-10, atol=1e-12)


def test_of_another_height_it_is_the_same_network():
    """Kernels and images transposed, the output is; its levels are named by both sides, as EDM's are."""
    wide, high = (_network(input_size=size).double() for size in ((8, 16), (16, 8)))
    assert list(wide.enc) == ["8x16_conv", "8x16_block0", "4x8_down", "4x8_block0"]
    attend = [name for name, block in wide.named_modules() if isinstance(block, _Block) and block.qkv is not None]
    assert attend == ["enc.4x8_block0", "dec.4x8_in0", "dec.4x8_block1"]  # 4 is the shorter side
    weights = zip(high.state_dict(), wide.state_dict().values(), strict=True)
    high.load_state_dict({name: value.mT if value.dim() == 4 else value for name, value in weights})
    x, t = torch.randn(3, 2, 8, 16).double(), torch.rand(3).double()
    out = wide(x, t, t / 2)
    assert out.shape == x.shape
    torch.testing.assert_close(high(x.mT, t, t / 2).mT, out)


def test_what_it_is_told():
    net, g = _network().double(), torch.Generator().manual_seed(1)
    x, t = torch.randn(4, 2, 8, 8, generator=g).double(), torch.rand(4, generator=g).double()
    labels, s = torch.tensor([0, 3, 9, 10]), t / 2
    out = net(x, t, s, labels)
    beside = torch.zeros(4, 1 + AUGMENT_DIM).double()
    beside[:, 0] = labels
    torch.testing.assert_close(net(x, t, s, beside), out)
    torch.testing.assert_close(net(x, t, s), net(x, t, s, torch.full((4,), net.null_label)))
    assert torch.equal(net(x, t, s)[3], out[3])
    for others in ((x, t + 0.1, s + 0.1, labels), (x, t, s + 0.1, labels), (x, t, s, labels.flip(0))):
        assert not torch.isclose(net(*others), out).flatten(1).all(1).any()
    with pytest.raises(ValueError, match=r"labels of shape \(4, 9\) do not fit.*give \(B,\) or \(B, 10\)"):
        net(x, t, s, beside[:, 1:])
    beside[:, 5] = 1
    assert not torch.isclose(net(x, t, s, beside), out).flatten(1).all(1).any()


def test_difference_forward():
    """As accurate as a float32 forward at any step, whatever it is told."""
    net, exact = _network(), _network().double()
    g = torch.Generator().manual_seed(1)
    x, v = (torch.randn(4, 2, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
    t, labels = torch.rand(4, generator=g).double(), torch.randn(4, 1 + AUGMENT_DIM, generator=g).double()
    labels[:, 0] = torch.tensor([0, 10, 9, 5])
    forward = ForwardDifference(net)
    for step in (1e-1, 1e-5):
        with torch.no_grad():
            truth = exact(x + step * v, t - step * t, t / 3, labels) - exact(x, t, t / 3, labels)
        F, dF = forward(*(z.float() for z in (x, t, t / 3, labels, step * v, -step * t)))
        assert (dF - truth).norm() <= 1e-5 * truth.norm()
    torch.testing.assert_close(F.double(), exact(x, t, t / 3, labels), rtol=1e-4, atol=1e-5)


def test_a_compiled_step_is_one_graph():
    """Augmentation, draws and difference forward."""

    def losses(compile):  # no resolution below, of which there are as many operators again
        model = SoFlow(_network(channel_mult=(1,), attention_resolutions=(8,)), velocity_share=0.5)
        optimizer = AdamW(model.parameters(), lr=1e-3, impl="torch")
        augment = Augment(0.5, 10, "torch")
        step = TrainStep(model, optimizer=optimizer, total_steps=9, augment=augment, compile=compile)
        g = torch.Generator().manual_seed(1)
        return [step(torch.randn(8, 2, 8, 8, generator=g), torch.arange(8)).loss.item() for _ in range(2)]

    assert losses("aot_eager") == pytest.approx(losses(False), rel=1e-5)


def _config(run_dir, **changes):
    model = ModelConfig(preset="UNet", input_size=8, in_channels=1, num_classes=0, dropout=0.2, **lists(SIZES))
    recipe = SoFlowConfig(velocity_share=0, guidance_scale=1, label_drop=0, p=0.75, eps=0.001, gap_init=1.0)
    data = DataConfig(kind="digits", workers=0, augment=0.3)
    return tiny_config(run_dir, **{"model": model, "soflow": recipe, "data": data, "total_steps": 4, **changes})


def test_every_weight_has_a_gradient_without_augmentation():
    """Else neither the one-pass optimizer nor several processes could train it."""
    net = _network()
    for labels in (torch.arange(4), None):
        net.zero_grad(set_to_none=True)
        net(torch.rand(4, 2, 8, 8), torch.rand(4), torch.zeros(4), labels).sum().backward()
        assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_samples_are_drawn_without_dropout(tmp_path):
    """During the training, from a loaded run and by the objective itself; the training's mode stays."""
    run = Trainer(_config(tmp_path, output=OutputConfig(sample_every=4, sample_shape=(2, 4), log_every=4)))
    run.fit()
    assert all(module.training for module in run.model.modules())
    _, model, _ = load_run(tmp_path, "cpu")
    sizes = {"shape": (1, 8, 8), "seed": run.config.seed, "batch": 8}
    wanted = next(Sampler(model, **sizes).draw(None, 8))
    save_samples(wanted, tmp_path / "wanted", 4)
    assert (tmp_path / "wanted.png").read_bytes() == (tmp_path / "samples" / "step-00000004.png").read_bytes()
    noise = torch.randn(8, 1, 8, 8)
    expected = model.sample(noise)
    model.train()
    assert torch.equal(model.sample(noise), expected)
    assert model.training
    assert not torch.equal(model.solution(noise, torch.ones(8), torch.zeros(8)), expected)


def test_unconditional_digits_are_scored(tmp_path):
    config = _config(tmp_path)
    Trainer(config).fit()
    scores = evaluate(load_run(tmp_path, "cpu")[1], config, tmp_path / "scored")
    assert scores.keys() == {"frechet_all", "frechet_held_out", "memorisation"}


def test_runs_go_on_exactly(tmp_path, monkeypatch):
    """As published for CIFAR-10: without classes, all rows for the consistency, dropout and augmentation."""
    straight = Trainer(_config(tmp_path / "straight"))
    before = straight.model.network.map_augment.weight.detach().clone()
    straight.fit()
    assert not torch.equal(straight.model.network.map_augment.weight, before)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StopError):
            Trainer(_config(tmp_path / "stopped")).fit()
    Trainer(_config(tmp_path / "stopped")).fit()
    assert_bitwise_equal(final(tmp_path / "straight", 4), final(tmp_path / "stopped", 4))


def test_dry_run_counts_four_forwards(tmp_path):
    """The value, its difference, and a backward twice as dear; the derivation is no part of a step."""
    config = _config(tmp_path)
    found = plan(config)
    with torch.device("meta"):
        net = UNet(8, 1, **SIZES, augment_dim=AUGMENT_DIM)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            net(torch.zeros(16, 1, 8, 8), torch.zeros(16), torch.zeros(16))
    assert found.flops == pytest.approx(4 * counter.get_total_flops(), rel=0.02)
    assert found.parameters == _count(net)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_size": 30}, r"input_size=30 cannot be halved for each of channel_mult=\(2, 2, 2\).*multiple of 4"),
        ({"input_size": (32, 30)}, r"input_size=\[32, 30\] cannot be halved for each of.*multiple of 4"),
        ({"input_size": (32, 64), "attention_resolutions": (64,)}, "has 64, .* are 32, 16, 8; choose"),
        ({"model_channels": 36}, "144 channels wide, which 32 groups do not divide; choose model_channels=32"),
        ({"model_channels": 3}, "model_channels=3 must be even"),
        ({"dropout": 1.0}, r"dropout=1\.0 is outside \[0, 1\)"),
        ({"channel_mult": ()}, r"channel_mult=\(\) has no level"),
        ({"attention_resolutions": (16, 5)}, r"attention_resolutions=\(16, 5\) has 5, .* are 32, 16, 8; choose"),
    ],
)
def test_sizes_that_cannot_be(options, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        UNet(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "UNet", "depth": 2}, "model.depth=2 does nothing with model.preset='UNet'; leave it out"),
        (
            {"preset": "UNet", "float8_guidance": True},
            "model.float8_guidance=True does nothing with model.preset='UNet'",
        ),
        ({"preset": "UNet", "recompute": "block"}, "model.recompute='block' does nothing with model.preset='UNet'"),
        ({"preset": "DiT-B/4", "dropout": 0.1}, "model.dropout=0.1 does nothing with model.preset='DiT-B/4'"),
        ({"preset": "UNet", "channel_mult": [1, 0]}, "model.channel_mult"),
    ],
)
def test_settings_of_the_other_network(options, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**options)


def test_a_preset_that_is_not_known_is_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"model\.preset='Unet' is not known; choose one of DiT-.*, UNet, or the import path"
    ):
        build_network(ModelConfig(preset="Unet", model_channels=16), 0.1)
