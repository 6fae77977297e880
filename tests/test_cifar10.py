"""CIFAR-10: a small set in the published form, whose MD5 sums stand for the published ones."""

import hashlib
import importlib.util
import pickle
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from runs import files, tiny_config, write_config
from torchvision import datasets

from soflow_fast.cli import main
from soflow_fast.config import DataConfig, ModelConfig
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
    images, labels = data.read(3, 11)
    assert images.dtype == torch.float32
    for wanted, pairs in (
        (range(3, 11), zip(images, labels, strict=True)),
        ([7, 3, 39, 3], data.__getitems__([7, 3, 39, 3])),
    ):
        for index, (image, label) in zip(wanted, pairs, strict=True):
            assert torch.equal(image, data[index][0])
            assert label == data[index][1]


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
