"""Starting from published flow matching transformers: their velocity, by a forward of their own written here."""

import math

import pytest
import torch
import torch.nn.functional as nnf
from runs import tiny_config

from soflow_fast import DiT, SoFlow, Trainer
from soflow_fast.cli import main
from soflow_fast.flow_weights import FORMS
from soflow_fast.objectives.flow_matching import FlowMatching
from soflow_fast.objectives.meanflow import MeanFlow
from soflow_fast.unet import UNet
from soflow_fast.weights import load_weights, read_weights

WIDTH, HEADS, DEPTH, PATCH, CHANNELS, CLASSES = 16, 2, 2, 4, 1, 10
OF_A_DIT = [form for form in FORMS if form != "imf"]


def _weights(form, sigma):
    """As those trainings save them, with weights drawn at random."""
    state = dict(DiT(8, PATCH, CHANNELS, WIDTH, DEPTH, HEADS, num_classes=CLASSES).state_dict())
    if form == "meanflow":
        state = {name.replace("s_embedder", "r_embedder"): value for name, value in state.items()}
    else:
        state = {name: value for name, value in state.items() if not name.startswith("s_embedder")}
    out = PATCH**2 * CHANNELS * (2 if sigma else 1)
    state |= {"final_layer.linear.weight": torch.empty(out, WIDTH), "final_layer.linear.bias": torch.empty(out)}
    if form == "repa":
        state |= {"projectors.0.0.weight": torch.empty(32, WIDTH), "projectors.0.0.bias": torch.empty(32)}
    generator = torch.Generator().manual_seed(1)
    drawn = {name: torch.randn(value.shape, generator=generator) / math.sqrt(WIDTH) for name, value in state.items()}
    return drawn | {"pos_embed": state["pos_embed"]}


def _velocity(w, x, t, y, r=None):
    """SiT: (B, C, H, W), (B,) and (B,) to the first C channels of what it predicts; MeanFlow's has a second time."""

    def linear(name, z):
        return z @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def modulated(z, shift, scale):
        return nnf.layer_norm(z, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def embedded(name, time):
        phase = time[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        features = torch.cat([torch.cos(phase), torch.sin(phase)], 1)
        return linear(f"{name}.mlp.2", nnf.silu(linear(f"{name}.mlp.0", features)))

    c = embedded("t_embedder", t) + (0 if r is None else embedded("r_embedder", t - r))
    c = nnf.silu(c + w["y_embedder.embedding_table.weight"][y])
    h = nnf.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH)
    h = h.flatten(2).mT + w["pos_embed"]
    for i in range(DEPTH):
        block = f"blocks.{i}"
        shift, scale, gate, shift2, scale2, gate2 = linear(f"{block}.adaLN_modulation.1", c).chunk(6, 1)
        qkv = linear(f"{block}.attn.qkv", modulated(h, shift, scale))
        q, k, v = qkv.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        o = (q @ k.mT / math.sqrt(WIDTH / HEADS)).softmax(-1) @ v
        h = h + gate[:, None] * linear(f"{block}.attn.proj", o.transpose(1, 2).flatten(2))
        u = nnf.gelu(linear(f"{block}.mlp.fc1", modulated(h, shift2, scale2)), approximate="tanh")
        h = h + gate2[:, None] * linear(f"{block}.mlp.fc2", u)
    h = linear("final_layer.linear", modulated(h, *linear("final_layer.adaLN_modulation.1", c).chunk(2, 1)))
    grid = x.shape[2] // PATCH
    pixels = h.unflatten(1, (grid, grid)).unflatten(3, (PATCH, PATCH, -1))
    return torch.einsum("nhwpqc->nchpwq", pixels).reshape(len(x), -1, *x.shape[2:])[:, :CHANNELS]


@pytest.mark.parametrize("sigma", [False, True])
@pytest.mark.parametrize(
    ("make", "options"),
    [(SoFlow, {}), (SoFlow, {"parameterization": "trig"}), (MeanFlow, {}), (FlowMatching, {})],
)
@pytest.mark.parametrize("form", ["sit", "repa"])
def test_the_velocity_is_theirs_at_every_second_time(tmp_path, form, make, options, sigma):
    theirs = _weights(form, sigma)
    torch.save({"ema": theirs, "model": {}, "args": None}, tmp_path / "x.pt")
    model = make(DiT(8, PATCH, CHANNELS, WIDTH, DEPTH, HEADS, num_classes=CLASSES), **options)
    assert load_weights(model, tmp_path / "x.pt", form=form).endswith(f"converted from {form}")
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(5, CHANNELS, 8, 8, generator=generator), torch.tensor([3, 1, 4, CLASSES, 9])
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    # SiT's path is t·data + (1−t)·noise, REPA's and ours (1−t)·data + t·noise
    wanted = -_velocity(theirs, x, 1 - t, y) if form == "sit" else _velocity(theirs, x, t, y)
    torch.testing.assert_close(model.velocity(x, t, y), wanted, rtol=1e-4, atol=1e-5)
    first, second = model.network(x, t, t, y), model.network(x, t, 0.3 * t, y)
    assert torch.equal(first, second)
    assert model.network.s_embedder.mlp[0].weight.std() > 0.01  # so that its last layer has a gradient


def test_what_they_have_beside_the_transformer_is_told(tmp_path, caplog):
    for form in OF_A_DIT:
        theirs = _weights(form, True)
        torch.save(theirs, tmp_path / "x.pt")
        load_weights(
            SoFlow(DiT(8, PATCH, CHANNELS, WIDTH, DEPTH, HEADS, num_classes=CLASSES)), tmp_path / "x.pt", form=form
        )
        names = f"2 of the {len(theirs)} weights there are not used (projectors.0.0.weight, projectors.0.0.bias)"
        assert [names in record.getMessage() for record in caplog.records] == ([True] if form == "repa" else [])
        caplog.clear()


@pytest.mark.parametrize("sigma", [False, True])
def test_the_average_velocity_is_theirs(tmp_path, sigma):
    theirs = _weights("meanflow", sigma)
    torch.save({"ema": theirs}, tmp_path / "x.pt")
    model = MeanFlow(DiT(8, PATCH, CHANNELS, WIDTH, DEPTH, HEADS, num_classes=CLASSES))
    load_weights(model, tmp_path / "x.pt", form="meanflow")
    noise, y = torch.randn(3, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 1, 4])
    wanted = noise - _velocity(theirs, noise, torch.ones(3), y, torch.zeros(3))
    torch.testing.assert_close(model.sample(noise, y), wanted, rtol=1e-4, atol=1e-5)


def test_a_run_starts_from_them_and_its_second_time_is_trained(tmp_path):
    torch.save(_weights("sit", True), tmp_path / "SiT.pt")
    config = tiny_config(tmp_path / "run", initial_weights=str(tmp_path / "SiT.pt"), initial_weights_form="sit")
    config.model.depth = DEPTH
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert main(["train", str(tmp_path / "config.yaml"), "--dry-run"]) == 0
    run = Trainer(config)
    run.fit()
    assert run.model.network.s_embedder.mlp[2].weight.abs().max() > 0


def test_what_is_no_such_transformer_is_refused(tmp_path):
    torch.save(_weights("sit", True), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="this network is a UNet; choose a DiT preset"):
        load_weights(UNet(input_size=8, in_channels=1, model_channels=8, num_classes=0), tmp_path / "x.pt", form="sit")
    net = DiT(8, PATCH, CHANNELS, WIDTH, DEPTH, HEADS, num_classes=CLASSES)
    with pytest.raises(ValueError, match="'dit' is not known; choose one of sit, repa, meanflow, imf, or own"):
        load_weights(net, tmp_path / "x.pt", form="dit")
    with pytest.raises(ValueError, match=r"final_layer.linear.bias is \(32,\) there and \(16,\) in this model"):
        load_weights(net, tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match=r"set initial_weights_form \(sit, repa, meanflow, imf\) if it is of one of those"
    ):
        load_weights(net, tmp_path / "x.pt")
    other = DiT(8, PATCH, CHANNELS, WIDTH, DEPTH, HEADS, num_classes=CLASSES + 5)
    with pytest.raises(ValueError, match=r"or leave it out by initial_weights_except: \[y_embedder\]"):
        load_weights(other, tmp_path / "x.pt", form="sit")
    normed = _weights("repa", False) | {"blocks.0.attn.q_norm.weight": torch.ones(8)}
    torch.save(normed, tmp_path / "normed.pt")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q_norm\.weight is \(8,\) there and missing in this model"):
        load_weights(net, tmp_path / "normed.pt", form="repa")
    torch.save(net.state_dict(), tmp_path / "own.pt")
    for form in OF_A_DIT:
        with pytest.raises(ValueError, match=r"these have an s_embedder, as this library's have; leave the form out"):
            load_weights(net, tmp_path / "own.pt", form=form)
    with pytest.raises(ValueError, match="initial_weights_form='sit' does nothing without initial_weights"):
        tiny_config(tmp_path, initial_weights_form="sit")


def test_weights_are_planned_without_storage(tmp_path):
    torch.save(_weights("sit", True), tmp_path / "x.pt")
    with torch.device("meta"):
        net = DiT(8, PATCH, CHANNELS, WIDTH, DEPTH, HEADS, num_classes=CLASSES)
    weights, _ = read_weights(net, tmp_path / "x.pt", form="sit")
    assert weights["s_embedder.mlp.2.bias"].is_meta
