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
from runs import pixel_features, tiny_config, write_images, write_statistics
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from soflow_fast import SoFlow, build, evaluate, fidelity, sample
from soflow_fast.autoencoder import vae_decoder
from soflow_fast.config import DataConfig, EvaluationConfig, SoFlowConfig
from soflow_fast.data import ImageFolder, digits
from soflow_fast.data.crop import centre_crop
from soflow_fast.fidelity import frechet_distance, load_statistics, scores
from soflow_fast.images import balanced_labels, grid, save_samples, to_uint8
from soflow_fast.kernels.reference import Stream, normal
from soflow_fast.sample import Sampler


def _points(n=500, seed=0):
    return torch.randn(n, 1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ known answers


def test_frechet_distance_of_a_shift_and_of_a_stretch():
    x = _points()
    # with equal covariances only the means count; with Σ' = 4Σ and mean' = 2·mean it is |mean|² + (1 + 4 − 2·2) tr Σ
    assert frechet_distance(x, x + 0.5) == pytest.approx(9 * 0.25, rel=1e-9)
    mean, covariance = x.flatten(1).mean(0), torch.cov(x.flatten(1).T)
    assert frechet_distance(x, 2 * x) == pytest.approx(float(mean.square().sum() + covariance.trace()), rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_distance_to_statistics_is_that_to_the_images(tmp_path, dtype):
    x, y = _points(), 1.5 * _points(seed=1) + 0.25
    file = write_statistics(tmp_path / "real.npz", y.flatten(1).numpy(), dtype)
    assert scores(x, load_statistics(file))["frechet"] == pytest.approx(frechet_distance(x, y), rel=1e-6)


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
            torch.cat(list(Sampler(model, (1, 8, 8), steps=steps, seed=3, batch=batch).draw(labels, 11)))
            for batch in (11, 4)
        )
        torch.testing.assert_close(whole, parts)
    noise = normal(torch.arange(11), 64, seed=3, step=0, stream=Stream.RENOISE).view(11, 1, 8, 8)
    one_step = noise - model.network(noise, torch.ones(11), torch.zeros(11), labels)
    torch.testing.assert_close(next(Sampler(model, (1, 8, 8), seed=3, batch=11).draw(labels, 11)), one_step)


def test_few_samples_are_of_classes_from_everywhere():
    assert balanced_labels(4, 10).tolist() == [0, 2, 5, 7]
    assert balanced_labels(64, 1000)[-1] == 984
    assert balanced_labels(3, 3).tolist() == [0, 1, 2]
    assert balanced_labels(0, 3).tolist() == []
    assert balanced_labels(3, 0) is None


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


def _folder_config(run_dir, folder, **evaluation):
    return tiny_config(
        run_dir,
        model=replace(tiny_config(run_dir).model, in_channels=3),
        data=DataConfig(kind="folder", path=str(folder), workers=0),
        evaluation=EvaluationConfig(**{"samples": 30, "batch_size": 7, "features": "pixels", **evaluation}),
    )


def test_folder_scores_equal_those_of_the_images(tmp_path):
    levels = write_images(tmp_path / "real")
    model, config = _model(channels=3), _folder_config(tmp_path, tmp_path / "real")
    (tmp_path / "samples").mkdir()
    Image.fromarray(levels[0]).save(tmp_path / "samples" / "of-an-earlier-evaluation.png")
    scores = evaluate.evaluate(model, config, tmp_path / "samples", seed=1)
    samples = torch.cat(list(Sampler(model, (3, 8, 8), seed=1, batch=30).draw(balanced_labels(30, 10), 30)))
    real = torch.from_numpy(levels).permute(0, 3, 1, 2)
    assert scores["frechet"] == pytest.approx(frechet_distance(to_uint8(samples), real), rel=1e-3)
    assert len(list((tmp_path / "samples").iterdir())) == 30


@pytest.mark.parametrize("kind", ["folder", "latents"])
def test_a_reference_is_cropped_to_a_height_and_a_width_as_the_training_data_are(tmp_path, kind):
    write_images(tmp_path / "real", size=(40, 37))
    channels, decode = (3, None) if kind == "folder" else (4, lambda latents: latents[:, :3])
    config = _folder_config(tmp_path, tmp_path / "real", reference=str(tmp_path / "real"))
    sizes = replace(config.model, input_size=(8, 12), in_channels=channels)
    config = replace(config, model=sizes, data=replace(config.data, kind=kind, vae=None if decode is None else "x"))
    evaluate.check_evaluation(config)
    model = build.build_model(config)
    scores = [evaluate.evaluate(model, config, tmp_path / "samples", decode=decode)["frechet"] for _ in range(2)]
    drawn = Sampler(model, (channels, 8, 12), batch=30).draw(balanced_labels(30, 10), 30, decode)
    samples = to_uint8(torch.cat(list(drawn)))
    if kind == "folder":
        data = ImageFolder(tmp_path / "real", channels=3, size=(8, 12), num_classes=10)
        real = to_uint8(torch.stack([image for image, _ in data]))
    else:
        files = sorted((tmp_path / "real").rglob("*.png"))
        real = np.stack([np.asarray(centre_crop(Image.open(file), (8, 12))) for file in files])
        real = torch.from_numpy(real).permute(0, 3, 1, 2)
    assert real.shape == samples.shape == (30, 3, 8, 12)
    assert scores == pytest.approx([frechet_distance(samples, real)] * 2, rel=1e-6)
    assert {Image.open(file).size for file in (tmp_path / "samples").iterdir()} == {(12, 8)}


def test_the_reference_is_read_again_only_if_it_changed(tmp_path, monkeypatch):
    write_images(tmp_path / "real")
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


def test_the_reference_is_read_before_anything_is_drawn_and_a_bad_image_named(tmp_path, monkeypatch):
    write_images(tmp_path / "real")
    bad = tmp_path / "real" / "class1" / "7.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    monkeypatch.setattr(evaluate, "Sampler", lambda *_, **__: pytest.fail("drawn"))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "earlier.png").touch()
    for size in (8, (8, 12)):
        config = _folder_config(tmp_path, tmp_path / "real")
        config = replace(config, model=replace(config.model, input_size=size))
        with pytest.raises(ValueError, match=rf"the image {bad} cannot be read \(.*\); repair or remove it"):
            evaluate.evaluate(build.build_model(config), config, tmp_path / "samples")
    assert (tmp_path / "samples" / "earlier.png").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": "inseption"}, ["evaluation.features='inseption' is not known", "inception-v3-compat, "]),
        ({"features": None, "weights": "nowhere.pth"}, ["weights of inception-v3-compat cannot be had", "nowhere.pth"]),
        ({"features": None, "weights": __file__}, ["weights of inception-v3-compat cannot be had"]),
        ({"reference": "nowhere"}, ["evaluation.reference='nowhere' does not exist", "or a .npz file of their"]),
        ({"reference": "nowhere.npz"}, ["evaluation.reference='nowhere.npz' does not exist", "folder of real images"]),
        ({"reference": "text"}, ["evaluation.reference='text' is neither a folder nor a .npz file", "give a folder"]),
        ({"reference": "empty"}, ["evaluation.reference='empty' holds fewer than 2 images"]),
    ],
)
def test_what_would_fail_is_found_before_anything_is_drawn(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("")
    write_images(tmp_path / "real", n=2)
    evaluate.check_evaluation(_folder_config(tmp_path, tmp_path / "real"))
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        evaluate.check_evaluation(_folder_config(tmp_path, tmp_path / "real", **changes))
    assert all(word in str(error.value) for word in words)
    large = _folder_config(tmp_path, tmp_path / "real")
    large = replace(large, model=replace(large.model, input_size=256))
    with pytest.raises(ValueError, match="pixels have 196608 values, of whose covariance 288 GiB would be needed"):
        evaluate.check_evaluation(large)


def _first_bytes_of_an_array_lost(content: bytes) -> bytes:
    start = content.index(b"NUMPY") + 200
    return content[:start] + bytes(8) + content[start + 8 :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: b"", "is no .npz file"),
        (lambda content: b"mu: 0", "is no .npz file"),
        (lambda content: content[:-1000], "is no .npz file, or not all of one; write or copy it again"),
        (lambda content: content[content.index(b"\x93NUMPY") :][:1000], "is no .npz file"),
        (_first_bytes_of_an_array_lost, "cannot be read (Bad CRC-32 for file 'mu.npy'); write or copy it again"),
    ],
)
def test_damaged_statistics(tmp_path, damage, words):
    file = write_statistics(tmp_path / "real.npz", np.random.default_rng(0).standard_normal((200, 192)))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(f"evaluation.reference={str(file)!r} {words}")):
        evaluate.check_evaluation(_folder_config(tmp_path, tmp_path, reference=str(file)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"mu": None, "arr_0": np.zeros(1)},
            "has no array 'mu' and holds sigma, arr_0; give a file with the mean as mu",
        ),
        ({"sigma": None}, "has no array 'sigma' and holds mu; give"),
        ({"mu": None, "sigma": None}, "has no array 'mu' and holds nothing; give"),
        ({"mu": np.zeros((1, 192))}, "has mu of shape (1, 192) and sigma of shape (192, 192), which are not (F,) and"),
        ({"mu": np.zeros(())}, "has mu of shape () and sigma of shape (192, 192), which are not"),
        ({"sigma": np.zeros(192)}, "has mu of shape (192,) and sigma of shape (192,), which are not"),
        ({"sigma": np.eye(191)}, "has mu of shape (192,) and sigma of shape (191, 191), which are not"),
        ({"mu": np.full(192, np.nan)}, "has values in mu that are not finite numbers; write the file again"),
        ({"sigma": np.full((192, 192), np.inf)}, "has values in sigma that are not finite numbers"),
        ({"mu": np.full(192, "0")}, "has values in mu that are not finite numbers"),
        ({"mu": np.full(192, None)}, "cannot be read (Object arrays cannot be loaded when allow_pickle=False); write"),
        (
            {"mu": np.zeros(64), "sigma": np.eye(64)},
            "holds statistics of 64 features, and evaluation.features='pixels' gives 192 of these samples; give",
        ),
    ],
)
def test_statistics_that_cannot_be_used(tmp_path, changes, words):
    features = np.random.default_rng(0).standard_normal((200, 192))
    file = write_statistics(tmp_path / "real.npz", features)
    config = _folder_config(tmp_path, tmp_path, reference=str(file))
    evaluate.check_evaluation(config)
    write_statistics(file, features, **changes)
    with pytest.raises(ValueError, match=re.escape(f"evaluation.reference={str(file)!r} {words}")):
        evaluate.check_evaluation(config)


def test_scores_of_grey_samples_against_statistics(tmp_path):
    """They are read as RGB; of ADM's files only the statistics are (the images, here a pickle, could not be)."""
    levels = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 1), dtype=np.uint8).repeat(3, axis=3)
    file = write_statistics(tmp_path / "real.npz", pixel_features(levels), arr_0=np.array([None]))
    config = _folder_config(tmp_path, tmp_path, reference=str(file))
    config = replace(config, model=replace(config.model, in_channels=1))
    evaluate.check_evaluation(config)
    model = _model()
    scores = evaluate.evaluate(model, config, tmp_path / "run" / "samples", seed=1)
    samples = to_uint8(torch.cat(list(Sampler(model, (1, 8, 8), seed=1, batch=30).draw(balanced_labels(30, 10), 30))))
    real = torch.from_numpy(levels).permute(0, 3, 1, 2)
    assert scores["frechet"] == pytest.approx(frechet_distance(samples.expand(-1, 3, -1, -1), real), rel=1e-3)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["samples"]  # no statistics of images to keep


class _MeanColour(fidelity.PixelFeatures):
    """Stands in for a trained extractor: three features of an image of any size."""

    def forward(self, images):
        return (images.float().mean(dim=(2, 3)),)


def _decoded_config(tmp_path, monkeypatch, features, reference):
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "mean-colour", _MeanColour)
    config = _folder_config(tmp_path, tmp_path, reference=str(reference), features=features)
    return replace(config, data=DataConfig(kind="latents", vae="x"), model=replace(config.model, in_channels=4))


def test_scores_of_decoded_latents_against_statistics(tmp_path, monkeypatch):
    levels, model, scores = write_images(tmp_path / "real"), _model(channels=4), []
    file = write_statistics(tmp_path / "real.npz", levels.mean(axis=(1, 2)))
    for reference in (tmp_path / "real", file):
        config = _decoded_config(tmp_path, monkeypatch, "mean-colour", reference)
        evaluate.check_evaluation(config)
        found = evaluate.evaluate(model, config, tmp_path / "run" / "samples", decode=lambda latents: latents[:, :3])
        scores.append(found["frechet"])
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


def test_statistics_of_other_features_for_decoded_latents(tmp_path, monkeypatch):
    file = write_statistics(tmp_path / "real.npz", np.random.default_rng(0).standard_normal((200, 768)))
    sentence = "holds statistics of 768 features, and evaluation.features='{}' gives {} of these samples; give"
    with pytest.raises(ValueError, match=sentence.format("mean-colour", 3)):
        evaluate.check_evaluation(_decoded_config(tmp_path, monkeypatch, "mean-colour", file))
    monkeypatch.setattr(evaluate, "Sampler", lambda *_, **__: pytest.fail("drawn"))
    config = _decoded_config(tmp_path, monkeypatch, "pixels", file)
    evaluate.check_evaluation(config)  # how many pixels a latent is decoded to shows only when it is
    with pytest.raises(ValueError, match=sentence.format("pixels", 192)):
        evaluate.evaluate(_model(channels=4), config, tmp_path / "samples", decode=lambda latents: latents[:, :3])


@pytest.mark.parametrize("name", ["reference", "features", "weights"])
def test_settings_that_would_do_nothing_are_refused(tmp_path, name):
    for config, why in (
        (tiny_config(tmp_path), "the digits are always compared with the real digits"),
        (tiny_config(tmp_path, data=DataConfig(kind="latents")), "no autoencoder is set"),
    ):
        evaluate.check_evaluation(config)
        with pytest.raises(ValueError, match=rf"evaluation\.{name}='x' does nothing here: {why}"):
            evaluate.check_evaluation(replace(config, evaluation=EvaluationConfig(**{name: "x"})))


def test_nothing_is_drawn_for_no_score(tmp_path):
    latents = replace(tiny_config(tmp_path).model, in_channels=4), DataConfig(kind="latents")
    images = replace(tiny_config(tmp_path).model, in_channels=3), DataConfig(kind="my_package.Photos")
    for (network, data), why in (
        (latents, r"no autoencoder is set \(data\.vae\), so samples stay latents"),
        (images, r"evaluation\.reference is not set to a folder of real images or a \.npz file of their statistics"),
    ):
        config = tiny_config(tmp_path, model=network, data=data)
        with pytest.raises(ValueError, match=rf"no score is possible: {why}; set it, or draw without a score by"):
            evaluate.evaluate(torch.nn.Module(), config, tmp_path / "samples")
    assert not (tmp_path / "samples").exists()


class _FakeVae(torch.nn.Module):
    """Stands in for an autoencoder of diffusers: eight times the size, three of the channels."""

    config = types.SimpleNamespace(scaling_factor=0.18215)

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
    package.AutoModel = package.AutoencoderKL = _FakeVae
    package.__spec__ = importlib.util.spec_from_loader("diffusers", None)
    monkeypatch.setitem(sys.modules, "diffusers", package)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    decode = vae_decoder("some/vae", 0.18215, torch.device("cpu"))
    torch.testing.assert_close(decode(latents)[:, :, ::8, ::8], latents[:, :3] / 1.8215)
    sampler = Sampler(_model(channels=4), (4, 8, 8), batch=2)
    plain, decoded = (torch.cat(list(sampler.draw(None, 3, function))) for function in (None, decode))
    torch.testing.assert_close(decoded, decode(plain))
    monkeypatch.setattr(sample, "_DECODED_ROWS", 1)  # a few at a time
    monkeypatch.setattr(_FakeVae, "decode", lambda self, latents, whole=_FakeVae.decode: whole(self, latents[:1]))
    in_parts = torch.cat(list(sampler.draw(None, 3, decode)))
    torch.testing.assert_close(in_parts, decoded)
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
    sampler = Sampler(SoFlow(net, guidance_scale=1.0, label_drop=0.0), (1, 8, 8), steps=2, batch=2)
    parts = sampler.draw(balanced_labels(3, 0), 3)
    assert [len(part) for part in parts] == [2, 1]
