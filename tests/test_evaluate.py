"""Scores with known answers, and what an evaluation writes."""

import importlib.util
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import tiny_config, write_latents

from soflow_fast import SoFlow, build, evaluate
from soflow_fast.config import DataConfig, EvaluationConfig, ModelConfig, SoFlowConfig
from soflow_fast.data import digits
from soflow_fast.fidelity import frechet_distance
from soflow_fast.images import balanced_labels, generate, grid, save_samples, to_uint8, vae_decoder
from soflow_fast.kernels.reference import Stream, normal


def _points(n=500, seed=0):
    return torch.randn(n, 1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ known answers


def test_frechet_distance_of_a_shift_and_of_a_stretch():
    x = _points()
    # with equal covariances only the means count; with Σ' = 4Σ and mean' = 2·mean it is |mean|² + (1 + 4 − 2·2) tr Σ
    assert frechet_distance(x, x + 0.5) == pytest.approx(9 * 0.25, rel=1e-9)
    mean, covariance = x.flatten(1).mean(0), torch.cov(x.flatten(1).T)
    assert frechet_distance(x, 2 * x) == pytest.approx(float(mean.square().sum() + covariance.trace()), rel=1e-6)


def test_images_of_bytes_and_of_floats_are_the_same_pixels():
    levels = torch.randint(0, 256, (300, 1, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert frechet_distance(levels, levels.double() / 127.5 - 1) == pytest.approx(0, abs=1e-6)


def test_real_digits_and_noise_score_as_they_must():
    images, labels = digits("all").tensors
    real = evaluate.digit_scores(images, labels)
    assert real["frechet_all"] == pytest.approx(0, abs=1e-6)
    assert real["recognised"] > 0.99
    held_out = evaluate.digit_scores(*digits("held_out").tensors)
    assert held_out["frechet_held_out"] == pytest.approx(0, abs=1e-6)
    assert held_out["memorisation"] == pytest.approx(1)
    assert evaluate.digit_scores(*digits("train").tensors)["memorisation"] == 0
    noise = evaluate.digit_scores(torch.randn(1797, 1, 8, 8, generator=torch.Generator().manual_seed(0)), labels)
    assert noise["frechet_all"] == pytest.approx(62, abs=4)
    assert noise["recognised"] < 0.3
    halves = frechet_distance(images[:898], images[898:])
    assert halves == pytest.approx(0.28, abs=0.08)


# ------------------------------------------------------------------------------------------------- samples and files


def _model(channels=1, **changes):
    config = tiny_config("unused", soflow=SoFlowConfig(guidance_scale=1.0), **changes)
    model = build.build_model(replace(config, model=replace(config.model, in_channels=channels)))
    torch.nn.init.normal_(model.network.final_layer.linear.weight, generator=torch.Generator().manual_seed(0))
    return model


def test_samples_depend_on_their_number_alone():
    model, labels = _model(), balanced_labels(11, 10)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    for steps in (1, 2):
        whole, parts = (
            torch.cat(list(generate(model, labels, 11, (1, 8, 8), steps=steps, seed=3, batch=batch)))
            for batch in (11, 4)
        )
        torch.testing.assert_close(whole, parts)
    noise = normal(torch.arange(11), 64, seed=3, step=0, stream=Stream.RENOISE).view(11, 1, 8, 8)
    one_step = noise - model.network(noise, torch.ones(11), torch.zeros(11), labels)
    torch.testing.assert_close(next(generate(model, labels, 11, (1, 8, 8), steps=1, seed=3, batch=11)), one_step)


def test_grid_places_images_row_by_row():
    images = torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    picture = grid(images, columns=2, least_size=4)
    assert picture.shape == (1, 12, 12)
    assert (picture[0, 2, 2], picture[0, 2, 8], picture[0, 8, 2], picture[0, 8, 8]) == (-1, 0, 1, -1)
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0])).tolist() == [0, 0, 128, 255]


@pytest.mark.parametrize(("channels", "suffix"), [(1, ".png"), (3, ".png"), (4, ".npy")])
def test_saved_samples(tmp_path, channels, suffix):
    samples = torch.zeros(5, channels, 8, 8)
    path = save_samples(samples, tmp_path / "a" / "grid", 5)
    assert path.suffix == suffix
    if suffix == ".npy":
        assert np.array_equal(np.load(path), samples.numpy())
    else:
        assert Image.open(path).size == (5 * 34, 34)


def test_folder_scores_equal_those_of_the_images(tmp_path):
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(levels):
        (tmp_path / "real" / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "real" / f"class{number % 2}" / f"{number}.png")
    model = _model(channels=3)
    config = tiny_config(
        tmp_path,
        model=replace(tiny_config(tmp_path).model, in_channels=3),
        data=DataConfig(kind="folder", path=str(tmp_path / "real")),
        evaluation=EvaluationConfig(samples=30, batch_size=7, features="pixels"),
    )
    (tmp_path / "samples").mkdir()
    Image.fromarray(levels[0]).save(tmp_path / "samples" / "of-an-earlier-evaluation.png")
    scores = evaluate.evaluate(model, config, tmp_path / "samples", seed=1)
    samples = torch.cat(list(generate(model, balanced_labels(30, 10), 30, (3, 8, 8), steps=1, seed=1, batch=30)))
    real = torch.from_numpy(levels).permute(0, 3, 1, 2)
    assert scores["frechet"] == pytest.approx(frechet_distance(to_uint8(samples), real), rel=1e-3)
    assert len(list((tmp_path / "samples").iterdir())) == 30


def test_latents_without_an_autoencoder_are_written_and_said_to_be(tmp_path, caplog):
    config = tiny_config(
        tmp_path,
        model=ModelConfig(
            input_size=8, in_channels=4, num_classes=10, patch_size=4, hidden_size=16, depth=1, num_heads=2
        ),
        data=DataConfig(kind="latents", path=str(write_latents(tmp_path / "latents.hdf5"))),
    )
    model = _model(channels=4)
    scores = evaluate.evaluate(model, config, tmp_path / "out" / "step-1")
    assert "no autoencoder is set (data.vae), so the samples stay latents" in caplog.text
    assert np.load(scores["samples"]).shape == (20, 4, 8, 8)
    assert scores.keys() == {"samples"}


class _FakeVae(torch.nn.Module):
    """Stands in for diffusers' AutoencoderKL: eight times the size, three of the channels."""

    @classmethod
    def from_pretrained(cls, name, low_cpu_mem_usage):
        if name == "nowhere":
            raise OSError("no such autoencoder")
        return cls()

    def decode(self, latents):
        image = torch.nn.functional.interpolate(latents[:, :3], scale_factor=8) / 10
        return types.SimpleNamespace(sample=image)


def test_latents_are_unscaled_and_decoded(monkeypatch):
    package = types.ModuleType("diffusers")
    package.AutoencoderKL, package.__spec__ = _FakeVae, importlib.util.spec_from_loader("diffusers", None)
    monkeypatch.setitem(sys.modules, "diffusers", package)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    decode = vae_decoder("some/vae", 0.18215, torch.device("cpu"))
    torch.testing.assert_close(decode(latents)[:, :, ::8, ::8], latents[:, :3] / 1.8215)
    options = {"steps": 1, "seed": 0, "batch": 2}
    model = _model(channels=4)
    plain, decoded = (
        torch.cat(list(generate(model, None, 3, (4, 8, 8), decode=function, **options))) for function in (None, decode)
    )
    torch.testing.assert_close(decoded, decode(plain))
    with pytest.raises(ValueError, match=r"data\.vae='nowhere' cannot be read \(no such autoencoder\)"):
        vae_decoder("nowhere", 1.0, torch.device("cpu"))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"torch-fidelity, which is not installed; run pip install 'soflow-fast\[eval\]'"
    ):
        evaluate.check_evaluation(tiny_config("unused"))
    with pytest.raises(ValueError, match=r"data\.vae='x' needs the package diffusers"):
        vae_decoder("x", 1.0, torch.device("cpu"))
    with pytest.raises(ValueError, match="scikit-learn, which is not installed"):
        digits()


def test_scores_of_a_network_without_labels():
    net = build.build_network(replace(tiny_config("unused").model, num_classes=0), 0.0)
    parts = generate(
        SoFlow(net, guidance_scale=1.0, label_drop=0.0), balanced_labels(3, 0), 3, (1, 8, 8), steps=2, seed=0, batch=2
    )
    assert [len(part) for part in parts] == [2, 1]
