"""``soflow export``: programs that draw what the run draws where this package is not there, and weights in a file."""

import json
import re
import subprocess
import sys

import pytest
import torch
from encode_runs import write_vae
from runs import refused, tiny_config
from safetensors import SafetensorError, safe_open
from torch import nn

from soflow_fast import SoFlow, Trainer, UNet, export, load_weights
from soflow_fast.autoencoder import vae_decoder
from soflow_fast.cli import main
from soflow_fast.export import ABOUT, write_program
from soflow_fast.sample import Sampler
from soflow_fast.trainer import load_run

# The interpreter of Triton, or anything else of this package, would not be there either.
READER = """
import sys
sys.modules["soflow_fast"] = None
import torch
noise, labels = torch.load(sys.argv[2])
generator = torch.export.load(sys.argv[1]).module()
torch.save([generator(noise[:n], labels[:n]) for n in (1, 7)], sys.argv[3])
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on the digits."""
    folder = tmp_path_factory.mktemp("run")
    Trainer(tiny_config(folder)).fit()
    return folder


def _noise(rows, *shape, seed=5):
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def test_a_program_draws_the_runs_samples_without_this_package(run, tmp_path, capsys):
    path = tmp_path / "new" / "digits.pt2"
    assert main(["export", str(run), str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"generator of step 6, 1 step(s), in fp32: {path}" in printed
    assert "samples = generator(torch.randn(8, 1, 8, 8), torch.arange(8) % 10)" in printed
    assert list(path.parent.iterdir()) == [path]
    noise, labels = _noise(7, 1, 8, 8), torch.arange(7)
    torch.save((noise, labels), tmp_path / "given.pt")
    subprocess.run([sys.executable, "-c", READER, path, tmp_path / "given.pt", tmp_path / "drawn.pt"], check=True)
    one, seven = torch.load(tmp_path / "drawn.pt")
    wanted = load_run(run, "cpu")[1].sample(noise, labels)
    torch.testing.assert_close(seven, wanted)
    torch.testing.assert_close(one, wanted[:1])
    extra = {ABOUT: ""}
    torch.export.load(path, extra_files=extra)
    about = json.loads(extra[ABOUT])
    assert (about["step"], about["steps"], about["config"]["model"]["hidden_size"]) == (6, 1, 16)
    exec(printed[printed.index("generator = ") :], names := {"torch": torch})
    assert names["samples"].shape == (8, 1, 8, 8)


def test_of_several_steps_in_bfloat16_and_decoded(tmp_path):
    """The noise that is added is that of the seed given; the autoencoder stays in float32."""
    config = tiny_config(tmp_path).model
    options = {name: getattr(config, name) for name in ("patch_size", "hidden_size", "depth", "num_heads")}
    from soflow_fast import DiT

    torch.manual_seed(0)
    net = DiT(input_size=8, in_channels=4, num_classes=10, **options)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    model, decode = SoFlow(net), vae_decoder(write_vae(tmp_path / "vae"), 0.2, torch.device("cpu"))
    sampler = Sampler(model, (4, 8, 8), steps=2, seed=9, batch=5, precision="bf16", compile=False)
    latents = torch.cat(list(sampler.draw(torch.arange(5), 5)))
    noise = torch.cat(list(Sampler(_Identity(net), (4, 8, 8), seed=9, batch=5, precision="fp32").draw(None, 5)))
    usage = write_program(model, (4, 8, 8), tmp_path / "x.pt2", {}, steps=2, decode=decode, precision="bf16")
    # the limit is of diffusers' decoder
    assert usage.endswith("torch.arange(8) % 10, seed=torch.tensor(0))  # at most 63 rows a call")
    program = torch.export.load(tmp_path / "x.pt2").module()
    drawn = program(noise, torch.arange(5), seed=torch.tensor(9))
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, decode(latents), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        program(noise[:1], torch.arange(1), seed=torch.tensor(9)), drawn[:1], rtol=1e-2, atol=1e-2
    )
    other = program(noise, torch.arange(5), seed=torch.tensor(10))
    assert (drawn - other).abs().mean() > 1e-3
    parameters = dict(program.named_parameters())
    assert {p.dtype for name, p in parameters.items() if "network" in name} == {torch.bfloat16}
    assert {p.dtype for name, p in parameters.items() if "vae" in name} == {torch.float32}


class _Identity(SoFlow):
    """Whose samples are the noise."""

    def solution(self, x, t, s, labels=None):
        return x


def test_of_a_network_without_classes_under_autocast(tmp_path):
    torch.manual_seed(0)
    net = UNet(input_size=8, in_channels=1, num_classes=0, model_channels=16, channel_mult=(1,), num_blocks=1)
    model = SoFlow(net, guidance_scale=1.0, label_drop=0.0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    net.compute_dtype = torch.float32  # an attribute of its own, which does not say that it follows its parameters
    sampler = Sampler(model, (1, 8, 8), batch=4, precision="bf16", compile=False)
    assert sampler(None).isfinite().all()
    noise = _noise(4, 1, 8, 8)
    usage = write_program(model, (1, 8, 8), tmp_path / "x.pt2", {}, precision="bf16")
    assert usage.endswith("samples = generator(torch.randn(8, 1, 8, 8))")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model.sample(noise)
    torch.testing.assert_close(torch.export.load(tmp_path / "x.pt2").module()(noise), wanted)
    assert (wanted - model.sample(noise)).abs().max() > 1e-4
    assert sampler.precision == "bf16"


class _Net(nn.Module):
    num_classes = 0

    def __init__(self, form):
        super().__init__()
        self.form, self.scale = form, nn.Parameter(torch.ones(()))

    def forward(self, x, t, s, labels):
        if self.form == "values" and x.sum() > 0:
            return x
        if self.form == "len":
            return x + x.new_ones(len(x), 1, 1, 1)
        return self.scale * x + torch.randn(()) if self.form == "draws" else self.scale * x


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("values", "torch.export cannot capture _Net for any number of rows ("),
        ("len", "nor take their size by len(x): x.shape[0] is what may change"),
        ("draws", "draws other samples than it does: its forward depends on"),
    ],
)
def test_a_network_that_cannot_be_captured_leaves_no_file(tmp_path, form, words):
    model = SoFlow(_Net(form), guidance_scale=1.0, label_drop=0.0)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        write_program(model, (1, 8, 8), tmp_path / "x.pt2", {})
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_weights(run, tmp_path, capsys):
    path = tmp_path / "digits.safetensors"
    assert main(["export", str(run), str(path), "--step", "4"]) == 0
    assert f"averaged weights of step 4: {path}" in capsys.readouterr().out
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()[ABOUT])["step"] == 4
    wanted = load_run(run, "cpu", step=4)[1].state_dict()
    model = load_run(run, "cpu")[1]
    assert any(not torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    load_weights(model, path)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def test_a_full_disk_is_one_sentence(run, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("File too large")

    monkeypatch.setattr(export, "save_file", full)
    said = refused(capsys, "export", run, tmp_path / "digits.safetensors")
    assert "the file of weights cannot be written to" in said
    assert " (File too large), where " in said
    assert said.endswith(" MiB are free; if that is too little, make room or give another path\n")
    assert list(tmp_path.glob("*digits*")) == []


def test_refusals(run, tmp_path, capsys):
    assert "ends in neither .pt2, a program, nor .safetensors" in refused(capsys, "export", run, tmp_path / "x.onnx")
    assert "--steps=0 is not possible" in refused(capsys, "export", run, tmp_path / "x.pt2", "--steps", 0)
    said = refused(capsys, "export", run, tmp_path / "x.pt2", "--guidance-scale", 2, "--device", "cpu")
    assert "--guidance-scale is for runs of improved_meanflow" in said
    (tmp_path / "x.pt2").write_text("mine")
    assert "exists already; choose another" in refused(capsys, "export", run, tmp_path / "x.pt2")
    assert (tmp_path / "x.pt2").read_text() == "mine"
    with pytest.raises(ValueError, match=r"a program of 9 network calls takes torch\.export too long; choose"):
        write_program(load_run(run, "cpu")[1], (1, 8, 8), tmp_path / "y.pt2", {}, steps=9)
    with pytest.raises(ValueError, match="precision='fp16' is not known"):
        write_program(load_run(run, "cpu")[1], (1, 8, 8), tmp_path / "y.pt2", {}, precision="fp16")
