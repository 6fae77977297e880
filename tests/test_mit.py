"""The MiT against plain formulas, its two-head training against the published step, and its runs."""

import math
from dataclasses import replace

import pytest
import torch
from fast_step_runs import make_step, training_batch
from runs import StopError, assert_bitwise_equal, final, refused, stop_at, tiny_config, write_config
from soflow_formulas import drops
from torch.nn.attention import SDPBackend, sdpa_kernel

from soflow_fast import DiT, MiT, SoFlow, cli, load_run, load_weights
from soflow_fast.build import build_model
from soflow_fast.config import ImprovedMeanFlowConfig, ModelConfig, TrainConfig
from soflow_fast.differencing import ForwardDifference
from soflow_fast.dry_run import plan
from soflow_fast.kernels.reference import Stream, normal, uniform
from soflow_fast.objectives.improved_meanflow import ImprovedMeanFlow
from soflow_fast.trainer import Trainer

B, SEED, STEP = 8, 5, 7
SIZES = {"input_size": 8, "in_channels": 1, "hidden_size": 32, "depth": 3, "num_heads": 2, "head_depth": 2}
GUIDED = {**SIZES, "num_classes": 10, "condition_dim": 3, "velocity_head": True}


def _net(dtype=torch.float64, **options):
    """With every parameter drawn, also those that begin at 0 and 1."""
    torch.manual_seed(0)
    net = MiT(**{**GUIDED, **options})
    for p in net.parameters():
        if p.dim() == 1 or (p == 0).all():
            p.data += 0.4 * torch.randn_like(p)
    return net.to(dtype)


def _inputs(n=B, height=8, width=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, height, width, generator=generator, dtype=torch.float64)
    t = 0.2 + 0.8 * torch.rand(n, generator=generator, dtype=torch.float64)
    labels = torch.rand(n, 4, generator=generator)
    labels[:, 0] = torch.arange(n) % 11
    return x.to(dtype), t.to(dtype), (0.4 * t).to(dtype), labels


def _plain(net, x, t, s, labels):
    """Both heads by their formulas, attention row by row of complex numbers."""
    w = dict(net.named_parameters())
    patch, rows, columns = net.patch_size, *net.grid

    def embed(name, number):
        features = number[:, None] * torch.exp(-math.log(1e4) * torch.arange(128.0, dtype=x.dtype) / 128)
        features = torch.cat([features.cos(), features.sin()], 1)
        h = features @ w[f"{name}.mlp.0.weight"].T + w[f"{name}.mlp.0.bias"]
        return (h / (1 + torch.exp(-h))) @ w[f"{name}.mlp.2.weight"].T + w[f"{name}.mlp.2.bias"]

    def norm(y, name):
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def turned(y):  # (B, n, H, h)
        h = y.shape[-1]
        frequency = 1 / 1e4 ** (torch.arange(0, h, 2, dtype=x.dtype) / h)
        angle = torch.outer(torch.arange(y.shape[1], dtype=x.dtype), frequency)
        turns = torch.polar(torch.ones_like(angle), angle)
        pairs = torch.view_as_complex(y.reshape(*y.shape[:-1], h // 2, 2))
        return torch.view_as_real(pairs * turns[None, :, None]).reshape(y.shape)

    def block(y, name):
        h = norm(y, f"{name}.norm1")
        q, k, v = (
            (h @ w[f"{name}.attn.{z}_proj.weight"].T).reshape(*h.shape[:2], net.num_heads, -1) for z in ("q", "k", "v")
        )
        q, k = turned(norm(q, f"{name}.attn.q_norm")), turned(norm(k, f"{name}.attn.k_norm"))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(h.shape)
        y = y + out @ w[f"{name}.attn.out_proj.weight"].T * w[f"{name}.attn_gate"]
        h = norm(y, f"{name}.norm2")
        a, b = (h @ w[f"{name}.mlp.{z}.weight"].T for z in ("w1", "w3"))
        return y + (a * torch.sigmoid(a) * b) @ w[f"{name}.mlp.w2.weight"].T * w[f"{name}.mlp_gate"]

    told = {"class": w["y_embedder.embedding_table.weight"][labels[:, 0].long()]}
    if net.condition_dim:
        names = {"omega": "omega_embedder", "t_min": "cfg_t_start_embedder", "t_max": "cfg_t_end_embedder"}
        told |= {key: embed(name, labels[:, i].to(x)) for i, (key, name) in enumerate(names.items(), 1)}
    told["time"] = embed("h_embedder", t - s)
    sequence = [w[f"{key}_tokens"] + embedding[:, None] for key, embedding in told.items()]
    patches = torch.nn.functional.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
    y = torch.cat([*sequence, patches.flatten(2).mT], 1)
    for i in range(net.depth - net.head_depth):
        y = block(y, f"shared_blocks.{i}")
    outputs = []
    for head in ("u", "v")[: 1 + net.has_velocity_head]:
        z = y
        for i in range(net.head_depth):
            z = block(z, f"{head}_heads.{i}")
        z = norm(z[:, -rows * columns :], f"{head}_final_layer.norm")
        z = z @ w[f"{head}_final_layer.linear.weight"].T + w[f"{head}_final_layer.linear.bias"]
        z = z.reshape(len(x), rows, columns, patch, patch, -1)
        outputs.append(torch.einsum("nhwpqc->nchpwq", z).reshape(x.shape))
    return outputs


def test_both_heads_equal_the_plain_formulas():
    net, inputs = _net(), _inputs()
    for ours, plain in zip(net.forward_with_velocity(*inputs), _plain(net, *inputs), strict=True):
        assert torch.allclose(ours, plain, rtol=0, atol=1e-12)
    x, t, _, labels = inputs
    u, v = _plain(net, x, t, t, labels)
    assert torch.allclose(net(x, t, t, labels), u, rtol=0, atol=1e-12)
    assert torch.allclose(net.forward_velocity(x, t, labels), v, rtol=0, atol=1e-12)


def test_without_guidance_and_head_and_not_square():
    x, t, s, labels = _inputs(3, 8, 12)
    net = _net(input_size=(8, 12), condition_dim=0, velocity_head=False)
    assert not any(name.startswith(("v_", "omega", "cfg", "t_m")) for name in net.state_dict())
    (plain,) = _plain(net, x, t, s, labels)
    assert torch.allclose(net(x, t, s, labels[:, 0].long()), plain, rtol=0, atol=1e-12)
    assert torch.equal(net(x, t, s), net(x, t, s, torch.full((3,), 10)))
    unlabelled = _net(input_size=(8, 12), condition_dim=0, velocity_head=False, num_classes=0)
    assert unlabelled(x, t, s).shape == x.shape


def test_the_derived_tangent_equals_forward_mode_of_both_heads():
    net, (x, t, s, labels) = _net(), _inputs()
    dx, one = torch.randn_like(x), torch.ones_like(t)
    derived = ForwardDifference(net, method="forward_with_velocity")
    with sdpa_kernel(SDPBackend.MATH):
        u, du = torch.func.jvp(lambda x, t: net(x, t, s, labels), (x, t), (dx, one))
    (ours, v), change = derived(x, t, s, labels, dx[2:], one[2:], rows=slice(2, None), mode="tangent")
    assert torch.allclose(ours, u, rtol=0, atol=1e-12)
    assert torch.allclose(v, net.forward_with_velocity(x, t, s, labels)[1], rtol=0, atol=1e-12)
    assert torch.allclose(change, du[2:], rtol=0, atol=1e-11)
    assert not change.requires_grad
    tiny = 1e-9
    (_, _), moved = derived(x, t, s, labels, tiny * dx, tiny * one)
    assert (moved / tiny - du).abs().max() < 1e-7 * du.abs().max()


def _published(model, x, labels):
    """The published step in forward mode, every prediction of all rows; draws are the library's."""
    net, key, rows = model.network, {"seed": SEED, "step": STEP}, torch.arange(B)
    noise = normal(rows, 64, stream=Stream.NOISE, **key).double().view(x.shape)
    drop = drops(rows, 0.5, model.label_drop, **key)
    times = torch.sigmoid(-0.4 + normal(rows, 2, stream=Stream.TIMES, **key)).double()
    draws = uniform(rows, 3, stream=Stream.GUIDANCE, **key).double()
    velocity = rows % 2 == 0
    t, r = times.amax(1), torch.where(velocity, times.amax(1), times.amin(1))
    w = model.guidance_max ** draws[:, 0]
    start = torch.where(velocity, 0, 0.5 * draws[:, 1])
    end = torch.where(velocity, 1, 0.5 + 0.5 * draws[:, 2])
    wide = (-1, 1, 1, 1)
    z, v_t = (1 - t).view(wide) * x + t.view(wide) * noise, noise - x
    null = torch.full_like(labels, 10)

    def told(y, w, start, end):
        return torch.stack([y.double(), 1 - 1 / w, start, end], 1).float()

    always = torch.zeros_like(t), torch.ones_like(t)
    with torch.no_grad():

        def v(y, w):
            return net.forward_with_velocity(z, t, t, told(y, w, *always))[1]

        v_u = v(null, torch.ones_like(w))
        of_velocity = v_t + (1 - 1 / w).view(wide) * (v(labels, w) - v_u)
        inside = (start <= t) & (t <= end)
        now = torch.where(inside, w, 1.0)
        v_c = v(labels, now)
        v_g = v_t + (1 - 1 / now).view(wide) * (v_c - v_u)
        v_g = torch.where(velocity.view(wide), of_velocity, v_g)
        v_g = torch.where(drop.view(wide), v_t, v_g)
    seen = told(torch.where(drop, null, labels), w, start, end)
    with sdpa_kernel(SDPBackend.MATH):
        (_, _), (du, _) = torch.func.jvp(
            lambda z, t: net.forward_with_velocity(z, t, r, seen), (z, t), (v_c, torch.ones_like(t))
        )
    u, v_head = net.forward_with_velocity(z, t, r, seen)
    compound = u + (t - r).view(wide) * du.detach()
    total = 0.0
    for prediction in (compound, v_head):
        error = (prediction - v_g).square().flatten(1).sum(1)
        total = total + (error / (error.detach() + model.eps) ** model.p).mean()
    average = ~velocity
    assert min((drop & average).sum(), (~inside).sum(), (inside & average & ~drop).sum()) > 0
    return total, (v_head - v_g).square().flatten(1).mean(1)


@pytest.mark.parametrize("derivative", ["tangent", "finite_difference"])
def test_loss_and_gradient_are_those_of_the_published_step(derivative):
    options = {"label_drop": 0.4, "eps": 10.0, "derivative": derivative, "difference_step": 1e-6}
    model = ImprovedMeanFlow(_net(), **options)
    assert model.velocity_head
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (B,), generator=generator)
    out = model.loss(x, labels, 0.0, seed=SEED, step=STEP)
    theirs, mse = _published(model, x, labels)
    tolerance = 1e-5 if derivative == "finite_difference" else 1e-6  # the guidance is told in float32
    assert out.loss.item() == pytest.approx(theirs.item(), rel=tolerance)
    assert out.parts.keys() == {"velocity", "average", "velocity_head"}
    assert out.parts["velocity_head"].mse.sort().values.tolist() == pytest.approx(mse.sort().values.tolist(), rel=1e-5)
    named = dict(model.named_parameters())
    gradients = [torch.autograd.grad(loss, list(named.values())) for loss in (out.loss, theirs)]
    for name, ours, wanted in zip(named, *gradients, strict=True):
        assert (ours - wanted).norm() <= 10 * tolerance * (1e-3 + wanted.norm()), name
        assert wanted.norm() > 0, name


class _Given(torch.nn.Module):
    """A network of one's own with a head for the velocity, and a difference forward that knows nothing of it."""

    num_classes, condition_dim, has_velocity_head = 10, 3, True

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(2 + 11 + 3, 16)
        self.enter = torch.nn.Conv2d(1, 16, 3, padding=1)
        self.heads = torch.nn.ModuleList(torch.nn.Conv2d(16, 1, 3, padding=1) for _ in range(2))

    def _trunk(self, x, t, s, labels):
        classes = torch.nn.functional.one_hot(labels[:, 0].long(), 11)
        c = self.embed(torch.cat([torch.stack([t, s], 1), classes.to(x), labels[:, 1:].to(x)], 1))
        return torch.nn.functional.silu(self.enter(x) + c[:, :, None, None])

    def forward(self, x, t, s, labels):
        return self.heads[0](self._trunk(x, t, s, labels))

    def forward_with_velocity(self, x, t, s, labels):
        h = self._trunk(x, t, s, labels)
        return self.heads[0](h), self.heads[1](h)

    def forward_velocity(self, x, t, labels):
        return self.heads[1](self._trunk(x, t, t, labels))

    def forward_difference(self, *_, **__):
        raise AssertionError("it has no second head")


def test_a_given_network_with_a_second_head():
    torch.manual_seed(0)
    model = ImprovedMeanFlow(_Given().double(), label_drop=0.4, eps=10.0)
    x, labels = _inputs()[0], torch.arange(B) % 10
    ours, (theirs, _) = model.loss(x, labels, 0.0, seed=SEED, step=STEP).loss, _published(model, x, labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_the_head_may_be_left_alone():
    x, labels = training_batch(0, torch.float64)
    model = ImprovedMeanFlow(_net(), velocity_head=False)
    out = model.loss(x, labels, 0.0, seed=SEED, step=STEP)
    out.loss.backward()
    assert out.parts.keys() == {"velocity", "average"}
    assert all(p.grad is None for name, p in model.named_parameters() if name.startswith("network.v_"))


def test_initialisation():
    net = MiT(8, 2, 1, 64, 3, 2, num_classes=1000, head_depth=2, condition_dim=3, velocity_head=True)
    for name, p in net.named_parameters():
        last = name.split(".")[-2:]
        if name.endswith(("_gate", "bias")) or "final_layer.linear" in name:
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif name != "x_embedder.proj.weight":
            gain = 0.32 if last[0].startswith(("w", "q_", "k_", "v_", "out_")) else 1.0
            assert p.std().item() == pytest.approx(gain * p.shape[1] ** -0.5, rel=0.25), name


def test_the_presets_have_as_many_parameters_as_published():
    for name, millions in {"B/2": 89, "M/2": 174, "L/2": 409, "XL/2": 610}.items():
        with torch.device("meta"):
            net = MiT.from_preset(f"MiT-{name}", condition_dim=3)
        assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions


@pytest.mark.parametrize("objective", [SoFlow, ImprovedMeanFlow])
def test_compiled_equals_eager(objective):
    def train(**options):
        guided = objective is ImprovedMeanFlow
        net = _net(depth=2, head_depth=1, condition_dim=3 * guided, velocity_head=guided)
        model = objective(net, eps=10.0)  # a small one would leave little of the errors in the loss
        step, _ = make_step(model, **options)
        return [step(*training_batch(k, torch.float64)).loss.item() for k in range(2)]

    assert train(compile="aot_eager") == pytest.approx(train(), rel=1e-12)


def test_bf16_is_near_float32():
    x, labels = training_batch(0, torch.float32)
    losses = []
    for precision in ("fp32", "bf16"):
        net = _net(torch.float32, depth=2, head_depth=1)
        step, _ = make_step(ImprovedMeanFlow(net), precision=precision)
        losses.append(step(x, labels).parts)
    for name, part in losses[0].items():
        assert losses[1][name].mse.mean().item() == pytest.approx(part.mse.mean().item(), rel=0.03), name


def _config(folder, **changes) -> TrainConfig:
    """With a derivative that needs no capture."""
    sizes = {"input_size": 8, "in_channels": 1, "num_classes": 10, "patch_size": 4, "hidden_size": 16, "num_heads": 2}
    model = ModelConfig(preset="MiT-B/2", depth=2, head_depth=1, **sizes)
    section = ImprovedMeanFlowConfig(derivative="finite_difference")
    return tiny_config(
        folder, **{"model": model, "objective": "improved_meanflow", "improved_meanflow": section} | changes
    )


def test_a_run_resumes_bitwise_and_is_sampled_and_exported(tmp_path, monkeypatch, capsys):
    config = _config(tmp_path / "whole", total_steps=4)
    Trainer(config).fit()
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(StopError):
            Trainer(stopped).fit()
    Trainer(stopped).fit()
    assert_bitwise_equal(*(final(tmp_path / name, 4) for name in ("whole", "stopped")))
    run = ["--device", "cpu", "--guidance-scale", "2.5"]
    assert cli.main(["sample", str(tmp_path / "whole"), "--count", "8", *run]) == 0
    program = tmp_path / "whole.pt2"
    assert cli.main(["export", str(tmp_path / "whole"), str(program), *run]) == 0
    _, model, _ = load_run(tmp_path / "whole", "cpu")
    model.set_sample_guidance(2.5)
    noise, labels = torch.randn(3, 1, 8, 8), torch.tensor([1, 5, 10])
    drawn = torch.export.load(program).module()(noise, labels)
    assert torch.allclose(drawn, model.sample(noise, labels), atol=1e-5)
    capsys.readouterr()


@pytest.mark.parametrize("objective", ["soflow", "alphaflow", "flow_matching"])
def test_other_objectives_train_it_without_a_second_head(tmp_path, objective):
    config = _config(tmp_path, objective=objective, total_steps=2)
    config.model.num_classes = 0
    config.soflow.guidance_scale = config.flow_matching.guidance_scale = 1.0
    trainer = Trainer(config)
    assert not trainer.model.network.has_velocity_head
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.fit()
    assert any(not torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_dry_run_counts_both_heads(tmp_path):
    two, one = (
        plan(_config(tmp_path, improved_meanflow=ImprovedMeanFlowConfig(velocity_head=head))) for head in (None, False)
    )
    block = sum(p.numel() for p in build_model(_config(tmp_path)).network.v_heads.parameters())
    assert two.parameters > one.parameters + block
    assert two.flops > one.flops
    assert two.data == one.data


def _published_names(net):
    """The weights as the public PyTorch branch names them."""
    inside = {torch.nn.Linear: "._flax_linear", torch.nn.Embedding: "._flax_embedding"}
    layers = {name: inside.get(type(module), "") for name, module in net.named_modules()}
    split = {name: name.rpartition(".") for name in net.state_dict()}
    return {
        f"net.{module}{layers[module]}{dot}{last}": net.state_dict()[name]
        for name, (module, dot, last) in split.items()
    }


def test_published_weights_are_read(tmp_path):
    published, inputs = _net(torch.float32), _inputs(dtype=torch.float32)
    weights = _published_names(published)
    assert "net.u_heads.1.attn.q_proj._flax_linear.weight" in weights
    torch.save(weights, tmp_path / "full.pth")
    net = MiT(**GUIDED)
    load_weights(ImprovedMeanFlow(net), tmp_path / "full.pth", form="imf")
    both = published.forward_with_velocity(*inputs)
    assert all(map(torch.equal, net.forward_with_velocity(*inputs), both))
    torch.save({name: x for name, x in weights.items() if "v_heads" not in name}, tmp_path / "inference.pth")
    net = MiT(**{**GUIDED, "velocity_head": False})
    load_weights(net, tmp_path / "inference.pth", form="imf")
    assert torch.equal(net(*inputs), both[0])
    net = MiT(**GUIDED)
    with pytest.raises(ValueError, match="v_heads"):
        load_weights(net, tmp_path / "inference.pth", form="imf")
    load_weights(net, tmp_path / "inference.pth", ["v_heads"], form="imf")
    assert torch.equal(net(*inputs), both[0])
    with pytest.raises(
        ValueError, match="initial_weights_form='imf' is of transformers, and this network is a DiT; choose a MiT"
    ):
        load_weights(DiT(8, 2, 1, 32, 1, 2), tmp_path / "full.pth", form="imf")


def test_refusals(tmp_path, capsys):
    for options, message in (
        ({"patch_size": 3}, "patch_size=3 does not divide input_size=8"),
        ({"num_heads": 3}, "num_heads=3 does not divide hidden_size=32"),
        ({"hidden_size": 6}, "makes heads of 3, and rotary positions turn pairs of numbers; choose heads of an even"),
        ({"head_depth": 4}, "head_depth=4 is not among the depth=3 blocks; choose one from 1 to 3"),
        ({"condition_dim": 2}, "condition_dim=2 is not what a MiT is told beside the label; choose 3"),
    ):
        with pytest.raises(ValueError, match=message):
            MiT(**{**GUIDED, **options})
    with pytest.raises(ValueError, match=r"no preset is called 'MiT-S/2'; choose one of MiT-\{B,M,L,XL\}"):
        MiT.from_preset("MiT-S/2")
    with pytest.raises(ValueError, match="velocity_head=True trains a second head of the network, and this MiT has"):
        ImprovedMeanFlow(_net(velocity_head=False), velocity_head=True)
    net, (x, t, s, labels) = _net(), _inputs()
    with pytest.raises(ValueError, match=r"labels of shape \(8, 3\) do not fit a MiT with condition_dim=3"):
        net(x, t, s, labels[:, :3])
    with pytest.raises(ValueError, match=r"x of shape \(8, 1, 4, 8\) does not fit a MiT of input_size=8"):
        net(x[:, :, :4], t, s, labels)
    with pytest.raises(ValueError, match="this network has no row for 'no label'"):
        _net(class_dropout_prob=0.0)(x, t, s)
    file = write_config(tmp_path / "mit.yaml", _config(tmp_path / "run"))
    for arguments, message in (
        (["--model.attention", "math"], "model.attention='math' does nothing with model.preset='MiT-B/2'; leave it"),
        (["--model.preset", "DiT-B/4"], "model.head_depth=1 does nothing with model.preset='DiT-B/4'; leave it out"),
        (["--model.preset", "MiT-Q/2"], "no preset is called 'MiT-Q/2'"),
    ):
        assert message in refused(capsys, "train", file, *arguments)
