"""CIFAR-10: a small set in the published form, whose MD5 sums stand for the published ones."""

import hashlib
import importlib.util
import json
import pickle
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from runs import files, final, tiny_config, write_config, write_images
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torchvision import datasets

from soflow_fast import Trainer, build, evaluate, fidelity
from soflow_fast.cli import main
from soflow_fast.config import DataConfig, EvaluationConfig, ModelConfig, OutputConfig
from soflow_fast.data import CIFAR10, batches, load_resident, resident, resident_bytes

CPU = torch.device("cpu")
FOLDER = "cifar-10-batches-py"
PER_FILE = 8


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A folder with five files of eight images, and all training images (40, 3072) and labels (40,) as they are."""
    folder, generator = tmp_path / "data" / FOLDER, np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows, labels, sums = [], [], {}

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        data = generator.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8)
        data[0, :2] = 0, 255
        of_file = generator.integers(0, 10, PER_FILE).tolist()
        write(name, {"batch_label": name, "labels": of_file, "data": data, "filenames": ["x.png"] * PER_FILE})
        if name != "test_batch":
            rows.append(data)
            labels += of_file
    write("batches.meta", {"num_cases_per_batch": PER_FILE, "label_names": list("abcdefghij"), "num_vis": 3072})
    monkeypatch.setattr(
        datasets.CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)]
    )
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(datasets.CIFAR10, "url", "file:///nowhere/cifar-10-python.tar.gz")
    return folder.parent, np.concatenate(rows), np.array(labels)


@pytest.fixture
def published(written, tmp_path, monkeypatch):
    """The same as an archive to download, and the folder gone; the archive, and the list of what was asked for."""
    archive = tmp_path / "served" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        file.add(written[0] / FOLDER, FOLDER)
    (written[0] / FOLDER).rename(tmp_path / "original")
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            time.sleep(0.2)
            super().do_GET()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(archive.parent)))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    yield archive, asked
    server.shutdown()
    server.server_close()


# ---------------------------------------------------------------------------------------------------- what it yields


def test_images_and_labels_are_those_of_the_files_in_their_order(written):
    path, rows, labels = written
    data = CIFAR10(path)
    assert len(data) == 5 * PER_FILE
    for index, (image, label) in enumerate(data):
        assert (image.shape, image.dtype, label.dtype) == ((3, 32, 32), torch.float32, torch.int64)
        assert int(label) == labels[index]
        # the first 1,024 bytes are red, row by row, then green, then blue
        planes = [rows[index, 1024 * c : 1024 * (c + 1)].reshape(32, 32) for c in range(3)]
        assert np.abs(image.double().numpy() - (np.stack(planes) / 127.5 - 1)).max() < 2**-23
    assert (data[0][0].min(), data[0][0].max()) == (-1, 1)
    assert data.images.dtype == torch.uint8


def test_pieces_and_lists_are_the_items(written):
    data = CIFAR10(written[0])
    images, labels = data.read_range(3, 11)
    assert images.dtype == torch.float32
    for wanted, pairs in (
        (range(3, 11), zip(images, labels, strict=True)),
        ([7, 3, 39, 3], data.__getitems__([7, 3, 39, 3])),
    ):
        for index, (image, label) in zip(wanted, pairs, strict=True):
            assert torch.equal(image, data[index][0])
            assert label == data[index][1]


def test_the_test_images_can_be_validated_on(written, tmp_path):
    data = DataConfig(kind="cifar10", path=str(written[0]), workers=0, validation="held_out")
    config = tiny_config(tmp_path / "run", data=data)
    model = replace(config.model, in_channels=3, input_size=32, patch_size=16)
    run = Trainer(replace(config, model=model, output=replace(config.output, validate_every=2)))
    published = pickle.loads((written[0] / FOLDER / "test_batch").read_bytes())
    assert np.array_equal(run.validation.images.numpy().reshape(PER_FILE, -1), published["data"])
    assert run.validation.labels.tolist() == published["labels"]


@pytest.mark.parametrize("num_classes", [10, 0])
def test_batches_are_the_same_read_worked_on_and_held(written, monkeypatch, num_classes):
    path, rows, _ = written
    data = CIFAR10(path, num_classes=num_classes)
    monkeypatch.setattr(resident, "_CHUNK_BYTES", 7 * data[0][0].nbytes)
    held = load_resident(data, CPU, num_classes)
    assert resident_bytes(data) == held.samples.nbytes + 8 * len(rows)
    options = {"batch": 6, "steps": range(4, 9), "seed": 3, "num_classes": num_classes, "device": CPU}
    read, worked, resided = (
        list(batches(source, workers=workers, **options)) for source, workers in ((data, 0), (data, 2), (held, 0))
    )
    assert len(read) == 5
    for first, *others in zip(read, worked, resided, strict=True):
        for other in others:
            assert torch.equal(first[0], other[0])
            assert (first[1] is other[1] is None) if num_classes == 0 else torch.equal(first[1], other[1])


# ---------------------------------------------------------------------------------------------------------- download


def test_what_is_not_there_is_downloaded_once_and_whole(written, published):
    path, rows, labels = written
    _, asked = published
    CIFAR10(path / "alone")
    of_one = asked.copy()
    with ThreadPoolExecutor(4) as pool:  # a lock holds between two openings of its file, in one process too
        found = list(pool.map(lambda _: CIFAR10(path / "new"), range(4)))
    assert asked == 2 * of_one
    for data in found:
        assert np.array_equal(data.images.flatten(1).numpy(), rows)
        assert np.array_equal(data.labels.numpy(), labels)
    assert {file.name for file in (path / "new").iterdir()} == {FOLDER, ".cifar10-lock"}
    CIFAR10(path / "new")
    assert asked == 2 * of_one


def test_a_killed_download_is_done_again(written, published, monkeypatch):
    path, rows, _ = written
    archive, _ = published

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(datasets.utils, "extract_archive", killed)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # as SIGKILL would leave it
        with pytest.raises(KeyboardInterrupt):
            CIFAR10(path)
    left = path / ".cifar10-download"
    assert (left / archive.name).is_file()
    (left / FOLDER).mkdir()
    (left / FOLDER / "data_batch_1").write_bytes(b"the first of it")
    (left / archive.name).write_bytes(archive.read_bytes()[:100])
    assert np.array_equal(CIFAR10(path).images.flatten(1).numpy(), rows)
    assert not left.exists()


# ----------------------------------------------------------------------------------------------------------- refusals


def _cifar_config(run_dir, path, **changes):
    return tiny_config(
        run_dir,
        total_steps=2,
        model=ModelConfig(
            input_size=32, in_channels=3, num_classes=10, patch_size=16, hidden_size=16, depth=1, num_heads=2
        ),
        data=DataConfig(kind="cifar10", path=None if path is None else str(path), workers=0),
        **changes,
    )


def _nothing(data):
    pass


def _truncated(data):
    file = data / FOLDER / "data_batch_3"
    file.write_bytes(file.read_bytes()[:-1])


DAMAGED = ["cifar-10-batches-py is incomplete or damaged", "MD5", "remove it, and it is downloaded again"]


@pytest.mark.parametrize(
    ("damage", "changes", "words"),
    [
        (_truncated, {}, DAMAGED),
        (lambda data: (data / FOLDER / "test_batch").unlink(), {}, DAMAGED),
        (lambda data: (data / FOLDER / "batches.meta").write_bytes(b""), {}, DAMAGED),
        (
            lambda data: (data / FOLDER).rename(data / "elsewhere"),
            {},
            ["data' has no cifar-10-batches-py", "cannot be downloaded into it", "unpack file:///nowhere/cifar-10"],
        ),
        (
            _nothing,
            {"data.path": __file__},
            [f"data.path={__file__!r} has no cifar-10-batches-py", "cannot be downloaded into it", "File exists"],
        ),
        (_nothing, {"data.path": None}, ["data.path is missing, and data.kind='cifar10' needs one; set data.path"]),
        (
            _nothing,
            {"model.num_classes": 1000},
            ["model.num_classes=1000 does not fit CIFAR-10, which has 10 classes; set 10, or 0 for images without"],
        ),
        (_nothing, {"model.num_classes": 9}, ["model.num_classes=9 does not fit CIFAR-10"]),
        (
            _nothing,
            {"model.input_size": 16},
            ["samples of shape (3, 32, 32) and the model takes (3, 16, 16); set model.in_channels and model.input"],
        ),
        (_nothing, {"model.in_channels": 4}, ["samples of shape (3, 32, 32) and the model takes (4, 32, 32)"]),
        (_nothing, {"batch_size": 64}, ["batch_size=64 is more than the 40 samples"]),
    ],
)
def test_refusals(written, tmp_path, capsys, damage, changes, words):
    damage(written[0])
    before = {name: content for name, content in files(written[0]).items() if "lock" not in name}
    config = write_config(tmp_path / "config.yaml", _cifar_config(tmp_path / "run", written[0]))
    overrides = [
        text for name, value in changes.items() for text in (f"--{name}", "null" if value is None else str(value))
    ]
    assert main(["train", str(config), *overrides]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("soflow: ")
    assert sentence.count("\n") == 1
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "run").exists()
    assert {name: content for name, content in files(written[0]).items() if "lock" not in name} == before


def test_another_archive_is_refused_and_not_unpacked(written, published):
    published[0].write_bytes(published[0].read_bytes() + b"more")
    with pytest.raises(
        ValueError, match=r"has no cifar-10-batches-py, and .* cannot be downloaded .*corrupted.*; unpack"
    ):
        CIFAR10(written[0])
    assert [file.name for file in written[0].iterdir()] == [".cifar10-lock"]


def test_without_torchvision(written, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'cifar10' needs the package torchvision, which is not installed; run pip"):
        CIFAR10(written[0])


# ------------------------------------------------------------------------------------------------ training and scores


def _distance(first, second):
    """Fréchet distance of features (n, F) and (m, F): tr √(Σ₁Σ₂) is the sum of the singular values of A Bᵀ, where
    Σ₁ = AᵀA and Σ₂ = BᵀB."""
    means = [values.mean(axis=0) for values in (first, second)]
    A, B = ((values - mean) / np.sqrt(len(values) - 1) for values, mean in zip((first, second), means, strict=True))
    singular = np.linalg.svd(A @ B.T, compute_uv=False)
    return np.square(means[0] - means[1]).sum() + np.square(A).sum() + np.square(B).sum() - 2 * singular.sum()


class _MeanColour(fidelity.PixelFeatures):
    """Stands in for a trained extractor, three features of an image of bytes; counts the images."""

    seen = 0

    def forward(self, images):
        assert images.dtype == torch.uint8
        _MeanColour.seen += len(images)
        return (images.double().mean(dim=(2, 3)),)


@pytest.fixture
def mean_colour(monkeypatch):
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "mean-colour", _MeanColour)
    monkeypatch.setattr(_MeanColour, "seen", 0)
    return {"samples": 30, "batch_size": 16, "features": "mean-colour"}


def _samples(folder: Path) -> np.ndarray:
    """(n, 32, 32, 3) bytes of the PNG files in a folder."""
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])


def test_two_steps_are_the_same_wherever_the_data_lie_and_are_scored(written, tmp_path, mean_colour):
    path, rows, _ = written
    config = _cifar_config(
        tmp_path / "held",
        path,
        evaluation=EvaluationConfig(every=2, **mean_colour),
        output=OutputConfig(log_every=1, sample_every=2, checkpoint_every=2),
    )
    for name, on_device in (("held", True), ("read", False)):
        data = replace(config.data, on_device=on_device)
        run = Trainer(replace(config, run_dir=str(tmp_path / name), data=data))
        assert run.on_device == on_device
        run.fit()
    held, read = final(tmp_path / "held", 2), final(tmp_path / "read", 2)
    assert all(torch.equal(value, read.model[name]) for name, value in held.model.items())
    start = build.build_model(config).state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in held.model.items())
    lines = [json.loads(line) for line in (tmp_path / "held" / "metrics.jsonl").read_text().splitlines()]
    score = next(line["evaluation/frechet"] for line in lines if "evaluation/frechet" in line)
    drawn = _samples(tmp_path / "held" / "evaluation" / "during-training")
    real = rows.reshape(-1, 3, 1024).mean(axis=2)
    assert score == pytest.approx(_distance(drawn.mean(axis=(1, 2)), real), rel=1e-6)


def test_training_without_classes(written, tmp_path):
    config = _cifar_config(tmp_path / "run", written[0])
    config = replace(
        config,
        model=replace(config.model, num_classes=0),
        soflow=replace(config.soflow, label_drop=0.0, guidance_scale=1.0),
    )
    assert Trainer(config).fit().is_dir()


def test_the_statistics_are_kept_for_the_same_images_and_weights(written, tmp_path, mean_colour, monkeypatch):
    config = _cifar_config(tmp_path / "run", written[0], evaluation=EvaluationConfig(**mean_colour))
    assert evaluate.why_unscored(config) is None
    evaluate.check_evaluation(config)
    model, scores, original = build.build_model(config), [], CIFAR10.__init__

    def other(self, path, **options):
        original(self, path, **options)
        self.images[0] = 255 - self.images[0]

    weighed = replace(config, evaluation=replace(config.evaluation, weights=str(tmp_path / "weights.pth")))
    for wanted, images in ((config, 70), (config, 30), (weighed, 70), ("other", 70)):
        if wanted == "other":
            monkeypatch.setattr(CIFAR10, "__init__", other)
            wanted = config
        _MeanColour.seen = 0
        scores.append(evaluate.evaluate(model, wanted, tmp_path / "run" / "samples")["frechet"])
        assert _MeanColour.seen == images
    assert scores[0] == scores[1] == scores[2] != scores[3]
    assert len(list((tmp_path / "run" / "reference").iterdir())) == 3  # the statistics, without the features


def test_a_reference_that_is_given_comes_first(written, tmp_path, mean_colour):
    levels = write_images(tmp_path / "real")
    config = _cifar_config(tmp_path / "run", written[0])
    wanted = EvaluationConfig(reference=str(tmp_path / "real"), **mean_colour)
    config = replace(config, evaluation=wanted, data=replace(config.data, path="nowhere"))
    evaluate.check_evaluation(config)
    score = evaluate.evaluate(build.build_model(config), config, tmp_path / "samples")["frechet"]
    drawn = _samples(tmp_path / "samples").mean(axis=(1, 2))
    # torch-fidelity enlarges the real images of 8×8 pixels, which keeps their mean colours nearly as they are
    assert score == pytest.approx(_distance(drawn, levels.mean(axis=(1, 2))), rel=0.02)


@pytest.mark.parametrize("damage", [_truncated, lambda data: (data / FOLDER).rename(data / "elsewhere")])
def test_what_would_fail_is_found_before_anything_is_drawn(written, mean_colour, damage):
    config = _cifar_config("unused", written[0], evaluation=EvaluationConfig(**mean_colour))
    evaluate.check_evaluation(config)
    with pytest.raises(ValueError, match=r"evaluation\.features='inseption' is not known"):
        evaluate.check_evaluation(replace(config, evaluation=EvaluationConfig(features="inseption")))
    damage(written[0])
    with pytest.raises(ValueError, match=r"is incomplete or damaged|cannot be downloaded"):
        evaluate.check_evaluation(config)


def test_soflow_eval_compares_a_run_with_the_training_set(written, tmp_path, capsys, mean_colour):
    path, rows, _ = written
    run = tmp_path / "run"
    Trainer(_cifar_config(run, path)).fit()
    assert main(["eval", str(run), "--count", "30", "--features", "mean-colour", "--device", "cpu"]) == 0
    assert "frechet" in capsys.readouterr().out
    found = json.loads((run / "evaluation" / "step-00000002-1-step-30-samples-mean-colour.json").read_text())
    drawn = _samples(Path(found["samples"]))
    assert drawn.shape == (30, 32, 32, 3)
    real = rows.reshape(-1, 3, 1024).mean(axis=2)
    assert found["frechet"] == pytest.approx(_distance(drawn.mean(axis=(1, 2)), real), rel=1e-6)
