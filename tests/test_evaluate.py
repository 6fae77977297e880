"""Scores with known answers, and what an evaluation writes."""

import importlib.util
import re
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import tiny_config, write_latents

from soflow_fast import SoFlow, build, evaluate, fidelity
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


def _write_images(folder, n=30):
    """(n, 8, 8, 3) bytes, and two class folders of them as PNG."""
    levels = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(levels):
        (folder / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"class{number % 2}" / f"{number}.png")
    return levels


def _folder_config(run_dir, folder, **evaluation):
    return tiny_config(
        run_dir,
        model=replace(tiny_config(run_dir).model, in_channels=3),
        data=DataConfig(kind="folder", path=str(folder), workers=0),
        evaluation=EvaluationConfig(**{"samples": 30, "batch_size": 7, "features": "pixels", **evaluation}),
    )


def test_folder_scores_equal_those_of_the_images(tmp_path):
    levels = _write_images(tmp_path / "real")
    model, config = _model(channels=3), _folder_config(tmp_path, tmp_path / "real")
    (tmp_path / "samples").mkdir()
    Image.fromarray(levels[0]).save(tmp_path / "samples" / "of-an-earlier-evaluation.png")
    scores = evaluate.evaluate(model, config, tmp_path / "samples", seed=1)
    samples = torch.cat(list(generate(model, balanced_labels(30, 10), 30, (3, 8, 8), steps=1, seed=1, batch=30)))
    real = torch.from_numpy(levels).permute(0, 3, 1, 2)
    assert scores["frechet"] == pytest.approx(frechet_distance(to_uint8(samples), real), rel=1e-3)
    assert len(list((tmp_path / "samples").iterdir())) == 30


def test_the_reference_is_read_again_only_if_it_changed(tmp_path, monkeypatch):
    _write_images(tmp_path / "real")
    model, config = _model(channels=3), _folder_config(tmp_path, tmp_path / "real")
    seen, forward = [], fidelity.PixelFeatures.forward
    monkeypatch.setattr(fidelity.PixelFeatures, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    scores = []
    for images in (60, 30, 59):  # 30 samples, and the reference twice
        if images == 59:
            (tmp_path / "real" / "class0" / "0.png").unlink()
        seen.clear()
        scores.append(evaluate.evaluate(model, config, tmp_path / "run" / "samples")["frechet"])
        assert sum(seen) == images
    assert scores[0] == scores[1] != scores[2]
    assert len(list((tmp_path / "run" / "reference").iterdir())) == 2  # the statistics, without the features


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": "inseption"}, ["evaluation.features='inseption' is not known", "inception-v3-compat, "]),
        ({"features": None, "weights": "nowhere.pth"}, ["weights of inception-v3-compat cannot be had", "nowhere.pth"]),
        ({"features": None, "weights": __file__}, ["weights of inception-v3-compat cannot be had"]),
        ({"reference": "nowhere"}, ["evaluation.reference='nowhere' is not a folder"]),
        ({"reference": "empty"}, ["evaluation.reference='empty' holds fewer than two images"]),
    ],
)
def test_what_would_fail_is_found_before_anything_is_drawn(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    _write_images(tmp_path / "real", n=2)
    evaluate.check_evaluation(_folder_config(tmp_path, tmp_path / "real"))
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        evaluate.check_evaluation(_folder_config(tmp_path, tmp_path / "real", **changes))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("name", ["reference", "features", "weights"])
def test_settings_that_would_do_nothing_are_refused(tmp_path, name):
    for config, why in (
        (tiny_config(tmp_path), "the digits are always compared with the real digits"),
        (tiny_config(tmp_path, data=DataConfig(kind="latents")), "no autoencoder is set"),
    ):
        evaluate.check_evaluation(config)
        with pytest.raises(ValueError, match=rf"evaluation\.{name}='x' does nothing here: {why}"):
            evaluate.check_evaluation(replace(config, evaluation=EvaluationConfig(**{name: "x"})))


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
