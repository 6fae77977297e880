"""Inception Score, KID, improved precision and recall: known answers, and what an evaluation makes of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from runs import pixel_features, refused, tiny_config, write_images, write_statistics
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from soflow_fast import Trainer, evaluate, fidelity
from soflow_fast.cli import main
from soflow_fast.config import DataConfig, EvaluationConfig


class _Classifier(FeatureExtractorBase):
    """Takes the first row of an image for the logits of its classes."""

    @staticmethod
    def get_provided_features_list():
        return ("pixels", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "pixels"

    @staticmethod
    def can_be_compiled():
        return False

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)

    def forward(self, images):
        found = {"pixels": images.flatten(1).double(), "logits": images[:, 0, 0].double()}
        return tuple(found[name] for name in self.features_list)


torch_fidelity.register_feature_extractor("classifier-of-a-test", _Classifier)


def _points(n, offset=0.0, seed=0):
    return torch.randn(n, 1, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


def _kid(x, y):
    """The unbiased squared distance by the kernel (xᵀy/d + 1)³, equation 4 of arXiv 1801.01401, of sets of one size."""
    (x, y), n = (points.flatten(1).numpy() for points in (x, y)), len(x)
    same, other = (lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3), ~np.eye(n, dtype=bool)
    return sum(same(a, a)[other].sum() for a in (x, y)) / (n * (n - 1)) - 2 * same(x, y).mean()


def _scores(folder, samples, real, metrics, features="pixels"):
    statistics = fidelity.statistics_of(real, folder, "real", features=features)
    of_real = fidelity.features_of(real, metrics, folder, "real", features=features) if metrics != ["isc"] else None
    found = fidelity.scores(samples, statistics, metrics, of_real, features=features)
    distance = fidelity.frechet_distance(samples, real, features=features)
    assert found.pop("frechet") == pytest.approx(distance, rel=1e-6, abs=1e-3)
    return found


def test_kid_is_its_formula_on_images_evenly_spread(tmp_path, monkeypatch):
    samples, real = _points(60), _points(60, 0.5, seed=1)
    found = _scores(tmp_path / "few", samples, real, ["kid"])
    assert found["kid"] == pytest.approx(_kid(samples, real), rel=1e-6)  # every draw is of all
    assert found["kid_std"] == pytest.approx(0, abs=1e-9)
    monkeypatch.setattr(fidelity, "_MOST_REAL", 60)
    of_more = torch.stack([real, _points(60, 9.0, seed=2)], 1).flatten(0, 1)  # every second is of the former
    assert _scores(tmp_path / "more", samples, of_more, ["kid"])["kid"] == pytest.approx(found["kid"], rel=1e-6)


def test_precision_and_recall_of_samples_that_lack_half_of_the_data(tmp_path):
    near, far = _points(200, seed=1), _points(200, 100.0, seed=2)
    found = _scores(tmp_path / "lack", _points(100, seed=3), torch.cat([near, far]), ["prc"])
    assert found.keys() == {"improved_precision", "improved_recall"}
    assert found["improved_precision"] > 0.8
    assert 0.4 < found["improved_recall"] <= 0.5
    stray = torch.cat([_points(100, seed=3), _points(100, -100.0, seed=4)])
    assert 0.4 < _scores(tmp_path / "stray", stray, near, ["prc"])["improved_precision"] <= 0.5


def test_inception_score_of_certain_classes_is_how_many_there_are(tmp_path):
    images, features = torch.randn(500, 1, 2, 5, generator=torch.Generator().manual_seed(0)), "classifier-of-a-test"
    images[:, :, 0] = 0.0
    unsure = _scores(tmp_path / "unsure", images, images, ["isc"], features)
    assert unsure == {"inception_score": pytest.approx(1), "inception_score_std": pytest.approx(0, abs=1e-9)}
    images[range(500), 0, 0, [i % 5 for i in range(500)]] = 50.0
    certain = _scores(tmp_path / "certain", images, images, ["isc"], features)
    assert certain["inception_score"] == pytest.approx(5, rel=0.05)  # ten parts, each with about ten of every class


def _config(folder, real, **evaluation):
    data = DataConfig(kind="folder", path=str(real), workers=0)
    config = tiny_config(folder, data=data, total_steps=2)
    wanted = EvaluationConfig(samples=30, batch_size=30, features="pixels", metrics=("kid", "prc"))
    return replace(config, model=replace(config.model, in_channels=3), evaluation=replace(wanted, **evaluation))


def test_scores_of_a_run(tmp_path, capsys):
    """By the command against images in a file and in a folder, and during the training."""
    levels = write_images(tmp_path / "real", n=30)
    config = _config(tmp_path / "run", tmp_path / "real", every=2)
    Trainer(config).fit()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "evaluation/improved_recall" in lines[-1]
    file = write_statistics(tmp_path / "real.npz", pixel_features(levels), arr_0=levels)
    capsys.readouterr()
    command, found = ["eval", str(tmp_path / "run"), "--metrics", "prc,kid", "--reference"], []
    for reference in (tmp_path / "real", file):
        assert main([*command, str(reference)]) == 0
        written = Path(capsys.readouterr().out.split()[-1])
        assert "-samples-pixels-prc-kid-reference-real-" in written.name
        found.append(json.loads(written.read_text()))
    names = ("frechet", "kid", "improved_precision", "improved_recall")
    assert [found[0][name] for name in names] == pytest.approx([found[1][name] for name in names], rel=1e-5)
    assert found[0]["kid"] == pytest.approx(lines[-1]["evaluation/kid"], rel=1e-5)
    assert found[0]["precision"] == "fp32"  # of the sampling
    for arrays, sentence in (
        ({"arr_0": levels[:3]}, "holds fewer than 4 images"),
        ({"arr_0": levels[:, :4]}, "holds statistics of 192 features, and evaluation.features='pixels' gives 96"),
        ({"arr_0": levels / 255}, "holds no images (arr_0,"),
    ):
        write_statistics(file, pixel_features(levels), **arrays)
        assert sentence in refused(capsys, *command, file)
    write_statistics(file, pixel_features(levels))
    assert "holds no images (arr_0," in refused(capsys, *command, file)
    assert main([*command[:2], "--metrics", "", "--reference", str(file)]) == 0
    assert "evaluation.metrics=('fid',) does not fit" in refused(capsys, "eval", tmp_path / "run", "--metrics", "fid")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"metrics": ("isc",)}, "evaluation.metrics has isc, and evaluation.features='pixels' tells no classes"),
        ({"samples": 9, "metrics": ("isc",)}, "evaluation.samples=9 is not possible; it must be at least 10"),
        ({"samples": 3}, "evaluation.samples=3 is not possible; it must be at least 4"),
        ({"reference": "few"}, "evaluation.reference='few' holds fewer than 4 images"),
    ],
)
def test_refused(tmp_path, monkeypatch, changes, sentence):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "few", n=3)
    write_images(tmp_path / "real", n=4)
    evaluate.check_evaluation(_config(tmp_path, tmp_path / "real"))
    with pytest.raises(ValueError, match=sentence):
        evaluate.check_evaluation(_config(tmp_path, tmp_path / "real", **changes))


def test_the_digits_have_scores_of_their_own(tmp_path):
    config = tiny_config(tmp_path, evaluation=EvaluationConfig(metrics=("kid",)))
    with pytest.raises(ValueError, match=r"evaluation.metrics=\('kid',\) does nothing here: the digits are always"):
        evaluate.check_evaluation(config)
