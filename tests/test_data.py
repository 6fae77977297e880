"""Data sets, their refusals, and the order of the data."""

import os
import random
import re
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from runs import Augmented, Blobs, tiny_config, write_latents
from torch.utils.data import Subset, TensorDataset

from soflow_fast import build
from soflow_fast.conditions import ItemConditions
from soflow_fast.data import LatentMoments, batches, digits, load_resident, order, resident, resident_bytes
from soflow_fast.data.order import batch_indices, permutation

CPU = torch.device("cpu")
FORM = {"channels": 4, "size": 8, "num_classes": 10, "scale": 0.18215}


def _first_word(row: int, seed: int, step: int, stream: int) -> int:
    """The first output word of Philox4x32-10 as Salmon et al. (2011) define it."""
    c, k = [0, row, step, stream], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[0]


def _batches(dataset, steps, **options):
    options = {"batch": 8, "seed": 3, "num_classes": 10, "device": CPU, **options}
    return list(batches(dataset, steps=steps, **options))


# --------------------------------------------------------------------------------------------------------- order


def test_order_is_the_argsort_of_philox_words():
    seed, epoch, order_stream = 5 + (7 << 32), 2, 5
    words = [_first_word(row, seed, epoch, order_stream) for row in range(50)]
    assert permutation(50, seed, epoch).tolist() == sorted(range(50), key=words.__getitem__)


def test_the_order_does_not_depend_on_how_many_words_are_drawn_at_a_time(monkeypatch):
    drawn, philox = [], order.philox
    monkeypatch.setattr(order, "_CHUNK", 16)
    monkeypatch.setattr(
        order, "philox", lambda rows, *args, **how: drawn.append(len(rows)) or philox(rows, *args, **how)
    )
    found = permutation(37, 3, 1)
    words = philox(torch.arange(37), 1, seed=3, step=1, stream=order.Stream.ORDER)[:, 0]
    assert torch.equal(found, words.argsort(stable=True))
    assert drawn == [16, 16, 5]


def test_an_epoch_is_a_permutation_without_its_last_partial_batch():
    epochs = [[i for step in range(3 * e, 3 * e + 3) for i in batch_indices(14, 4, step, seed=0)] for e in range(2)]
    for epoch in epochs:
        assert len(set(epoch)) == 12
        assert set(epoch) <= set(range(14))
    assert epochs[0] != epochs[1]


def test_order_does_not_depend_on_workers_or_on_where_it_starts():
    straight = _batches(Blobs(30), range(7))
    for again in (
        _batches(Blobs(30), range(7), workers=2),
        _batches(Blobs(30), range(2)) + _batches(Blobs(30), range(2, 7)),
    ):
        for (x, y), (x_again, y_again) in zip(straight, again, strict=True):
            assert torch.equal(x, x_again)
            assert torch.equal(y, y_again)


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    _batches(Blobs(30), range(2), workers=1)
    assert torch.equal(torch.get_rng_state(), before)


class _Several(Augmented):
    """Of which several items can be asked for at a time."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize("make", [Augmented, _Several, lambda n: Subset(Augmented(n), range(n))])
def test_random_augmentation_depends_on_seed_step_and_row_alone(make):
    data, plain = make(8), Blobs(8)  # an epoch is one batch
    straight = [x for x, _ in _batches(data, range(5))]
    np.random.seed(7)
    random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    halves = [_batches(data, range(5), rows=rows) for rows in (slice(0, 4), slice(4, 8))]
    for again in (
        [x for x, _ in _batches(data, range(5), workers=2)],
        [x for x, _ in _batches(data, range(2)) + _batches(data, range(2, 5), workers=1)],
        [torch.cat([first, second]) for (first, _), (second, _) in zip(*halves, strict=True)],
    ):
        assert all(torch.equal(x, x_again) for x, x_again in zip(straight, again, strict=True))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    added = torch.stack(straight) - torch.stack([x for x, _ in _batches(plain, range(5))])
    assert added.flatten(2)[..., 0].unique().numel() == 5 * 8
    other = [x - y for (x, _), (y, _) in zip(*(_batches(d, range(5), seed=4) for d in (data, plain)), strict=True)]
    assert not torch.isclose(torch.stack(other), added).flatten(2).all(dim=2).any()


def test_without_classes_there_are_no_labels():
    assert _batches(Blobs(), range(1), num_classes=0)[0][1] is None


@pytest.mark.parametrize("workers", [0, 1])
def test_labels_outside_the_classes_are_refused(workers):
    with pytest.raises(ValueError, match=r"labels from \d to [6-9], outside the classes 0\.\.5; labels start at 0"):
        _batches(Blobs(classes=10), range(1), num_classes=6, batch=32, workers=workers)


class _Odd(Blobs):
    def __init__(self, sample, label):
        super().__init__()
        self.sample, self.label = sample, label

    def __getitem__(self, index):
        return self.sample, self.label


@pytest.mark.parametrize(
    ("sample", "label", "words"),
    [
        (torch.zeros(1, 8, 8, dtype=torch.uint8), 0, "samples of torch.uint8; they must be floating point"),
        (torch.zeros(1, 8, 8), 0.5, "labels of torch.float64; they must be integers"),
        (torch.zeros(1, 8, 8), torch.zeros(10), "labels of torch.float32; they must be integers"),
    ],
)
def test_samples_and_labels_of_another_kind_are_refused(sample, label, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        _batches(_Odd(sample, label), range(1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int16])
def test_labels_may_be_of_any_integers(dtype):
    """Torch finds neither the least nor the greatest of some of them."""
    labels = torch.arange(16).remainder(10).to(dtype)
    data = TensorDataset(torch.zeros(16, 1, 8, 8), labels)
    (_, found), *_ = _batches(data, range(1))
    assert found.dtype == torch.int64
    assert load_resident(data, CPU, 10).labels.tolist() == labels.tolist()
    with pytest.raises(ValueError, match=r"labels from 0 to 9, outside the classes 0\.\.5"):
        load_resident(data, CPU, 6)


class _Targets(Blobs):
    """As torchvision has it."""

    def __init__(self, targets):
        super().__init__()
        self.targets = targets


def _check(dataset, num_classes, **model):
    config = tiny_config("unused")
    build.check_dataset(replace(config, model=replace(config.model, num_classes=num_classes, **model)), dataset)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 2], "3 of 1000 classes have samples in the data; set model.num_classes=3"),
        ([0, 5], "2 of 1000 classes have samples in the data; set model.num_classes=6"),
        ([0, 999], "2 of 1000 classes have samples in the data"),
        (range(1000), None),
    ],
    ids=str,
)
def test_classes_without_samples_are_said(tmp_path, caplog, monkeypatch, labels, words):
    def said(dataset, **model):
        caplog.clear()
        _check(dataset, 1000, **model)
        assert caplog.messages == [words] * (words is not None)

    labels = torch.tensor([*labels] * 16 if len(labels) < 16 else labels)
    images = torch.zeros(len(labels), 1, 8, 8)
    said(TensorDataset(images, labels))
    path = write_latents(tmp_path / "latents.hdf5", n=len(labels), labels=labels.numpy())
    said(LatentMoments(path, **{**FORM, "num_classes": 1000}), in_channels=4)
    given = _Targets(labels.tolist())
    given.samples = images
    said(given)
    given.targets = [str(label) for label in given.targets]  # none that could be counted
    words = None
    said(given)
    monkeypatch.setenv("RANK", "1")
    said(TensorDataset(images, labels))


# ------------------------------------------------------------------------------------------------- on the device


@pytest.mark.parametrize("rows", [slice(None), slice(0, 4), slice(4, 8)], ids=str)
@pytest.mark.parametrize("num_classes", [10, 0])
def test_data_on_the_device_are_the_same_batches(rows, num_classes):
    options = {"rows": rows, "num_classes": num_classes}
    read = _batches(digits(), range(165, 180), **options)  # an epoch has 168 batches
    held = _batches(load_resident(digits(), CPU, num_classes), range(165, 180), **options)
    whole = _batches(digits(), range(165, 180))
    for (x, labels), (x_held, labels_held), (x_whole, labels_whole) in zip(read, held, whole, strict=True):
        assert torch.equal(x, x_whole[rows])
        assert torch.equal(x_held, x)
        assert (x_held.dtype, len(x_held)) == (torch.float32, 8 if rows == slice(None) else 4)
        for given in (labels, labels_held):
            assert given is None if num_classes == 0 else torch.equal(given, labels_whole[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_on_the_device_are_read_in_pieces_and_rounded_once(tmp_path, monkeypatch, dtype):
    path = write_latents(tmp_path / "latents.hdf5")
    data = LatentMoments(path, **FORM, dtype=dtype)
    monkeypatch.setattr(resident, "_CHUNK_BYTES", 7 * data[0][0].nbytes)
    pieces = []
    read = LatentMoments.read_range
    monkeypatch.setattr(LatentMoments, "read_range", lambda self, *ends: pieces.append(ends) or read(self, *ends))
    held = load_resident(data, CPU, 10)
    assert pieces == [(0, 7), (7, 14), (14, 21), (21, 28), (28, 35), (35, 40)]
    assert resident_bytes(data) == held.samples.nbytes + held.labels.nbytes
    with h5py.File(path) as file:
        truth, labels = torch.from_numpy(file["latents"][:]), torch.from_numpy(file["labels"][:])
    assert held.samples.dtype == dtype
    assert torch.equal(held.labels, labels)
    error = (held.samples.float() - truth).abs()
    assert (error <= 2**-8 * truth.abs()).all()
    assert (error.max() == 0) == (dtype == torch.float32)
    assert torch.equal(held.samples, truth.to(dtype))
    for (x, y), (x_held, y_held) in zip(_batches(data, range(9)), _batches(held, range(9)), strict=True):
        assert torch.equal(x, x_held)
        assert torch.equal(y, y_held)


def test_bad_data_are_refused_on_the_way_to_the_device():
    with pytest.raises(ValueError, match=r"labels from 0 to 9, outside the classes 0\.\.5"):
        load_resident(digits(), CPU, 6)
    with pytest.raises(ValueError, match=r"samples of torch\.uint8; they must be floating point"):
        load_resident(TensorDataset(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4)), CPU, 0)


def test_only_data_that_can_be_read_in_pieces_can_be_held():
    assert resident_bytes(digits()) == 1347 * (64 * 4 + 8)
    assert resident_bytes(Blobs()) is None


class _Mirrored(TensorDataset):
    """Its items are others every time, and are of one sample: a slice would be mirrored as a whole."""

    def __getitem__(self, index):
        x, label = super().__getitem__(index)
        return x.flip(-1) if torch.rand(()) < 0.5 else x, label

    def read(self, path):
        raise AssertionError


def test_what_a_subclass_makes_of_tensors_is_read_item_by_item():
    images, labels = torch.arange(64 * 4.0).view(64, 1, 1, 4), torch.arange(64) % 10
    data = _Mirrored(images, labels)
    assert resident_bytes(data) is None
    (first, _), (again, _) = (_batches(data, range(1))[0] for _ in range(2))
    assert torch.equal(first, again)  # each item's draws are seeded
    assert 0 < sum(x[0, 0, 0] > x[0, 0, 1] for x in first) < len(first)
    assert ItemConditions(data, torch.arange(3))[:].tolist() == labels[:3].tolist()


# -------------------------------------------------------------------------------------------------------- digits


def test_digits_split_never_changes_and_covers_everything():
    parts = {name: digits(name).tensors for name in ("train", "held_out", "all")}
    assert [len(parts[name][0]) for name in parts] == [1347, 450, 1797]
    images, labels = parts["all"]
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max(), images.dtype) == (-1, 1, torch.float32)
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    together = torch.cat([parts["train"][0], parts["held_out"][0]])
    assert torch.equal(together, images)
    with pytest.raises(ValueError, match="split='test' is not known"):
        digits("test")


# ------------------------------------------------------------------------------------------------------- latents


@pytest.mark.parametrize("as_folder", [False, True])
def test_latents_are_what_the_file_holds_in_the_order_asked_for(tmp_path, as_folder):
    path = write_latents(tmp_path / "imagenet_latent.hdf5")
    data = LatentMoments(tmp_path if as_folder else path, **FORM)
    with h5py.File(path) as file:
        latents, labels = file["latents"][:], file["labels"][:]
    wanted = [7, 3, 39, 3, 0]
    assert len(data) == 40
    for (moments, label), index in zip(data.__getitems__(wanted), wanted, strict=True):
        assert np.array_equal(moments.numpy(), latents[index])
        assert label == labels[index]
    assert np.array_equal(data[5][0].numpy(), latents[5])


@pytest.mark.parametrize(
    ("dtype", "form", "direct"),
    [
        ("<f4", {}, True),
        (">f4", {}, True),
        ("<f2", {}, True),
        ("<f4", {"chunks": (5, 8, 8, 8)}, False),
        ("<f4", {"chunks": (5, 8, 8, 8), "compression": "gzip"}, False),
        ("other", {}, False),
    ],
)
def test_rows_that_lie_in_the_file_as_they_are_are_read_without_hdf5(tmp_path, monkeypatch, dtype, form, direct):
    path, moments = tmp_path / "latents.hdf5", _moments()
    with h5py.File(path, "w", userblock_size=512) as file:
        file["labels"] = np.arange(40) % 10
        if dtype == "other":  # of a bias that numpy has not
            kind = h5py.h5t.IEEE_F32LE.copy()
            kind.set_ebias(126)
            space = h5py.h5s.create_simple(moments.shape)
            h5py.Dataset(h5py.h5d.create(file.id, b"latents", kind, space))[:] = moments
        else:
            file.create_dataset("latents", data=moments, dtype=dtype, **form)
    data, asked = LatentMoments(path, **FORM), []
    with h5py.File(path) as file:
        expected = file["latents"][:].astype(np.float32)
    read = h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda self, rows: asked.append(rows) or read(self, rows))
    wanted = [7, 3, 39, 3, 0]
    assert all(np.array_equal(x, expected[i]) for (x, _), i in zip(data.__getitems__(wanted), wanted, strict=True))
    assert (asked == []) == direct
    assert torch.equal(data[-1][0], data[39][0])
    with pytest.raises(OSError, match="not within extent"):
        data[40]
    os.truncate(path, os.path.getsize(path) - 4)
    if direct:
        with pytest.raises(ValueError, match=r"latents\.hdf5 ends before sample 39; write or copy it again"):
            data[39]


def test_latents_can_be_read_by_workers(tmp_path):
    data = LatentMoments(write_latents(tmp_path / "latents.hdf5"), **FORM)
    first = data[0][0]  # the file is open before the workers start
    plain, worked = _batches(data, range(3)), _batches(data, range(3), workers=2)
    assert first.shape == (8, 8, 8)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, worked, strict=True))


def _moments(mean=5.5, std=0.05, shape=(40, 4, 8, 8)):
    noise = np.random.default_rng(1).standard_normal(shape)
    return np.concatenate([mean * noise, np.full(shape, std)], axis=1).astype(np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latents": None}, ["no array 'latents'", "(N, 8, 8, 8)"]),
        ({"labels": None}, ["no array 'labels'"]),
        ({"latents": _moments(shape=(40, 3, 8, 8))}, ["(40, 6, 8, 8)", "4 channels of mean"]),
        ({"latents": _moments(shape=(40, 4, 4, 4))}, ["(40, 8, 4, 4)", "(N, 8, 8, 8)"]),
        ({"latents": np.zeros((40, 8), np.float32)}, ["(40, 8)"]),
        ({"labels": np.arange(39)}, ["(39,)", "(40,)"]),
        ({"labels": np.zeros(40, np.float32)}, ["float32", "integers"]),
        ({"labels": np.arange(40)}, ["0 to 39", "0..9", "model.num_classes"]),
        ({"labels": np.arange(40) - 1}, ["-1 to 38", "0..9"]),
        ({"amount": np.int64(50)}, ["amount=50", "40", "incomplete"]),
        ({"latent_size": np.int64(64)}, ["latent_size=64", "8"]),
        ({"latents": _moments(std=-3.0)}, ["standard deviations", "go down to -3", "logarithm"]),
        ({"latents": np.zeros((40, 8, 8, 8), np.float32)}, ["are all the same"]),
        ({"latents": _moments(mean=np.nan)}, ["not finite"]),
        ({"latents": _moments() * np.float32(0.18215)}, ["0.18215", "near 1", "unscaled"]),
        ({"latents": _moments() / np.float32(0.18215)}, ["0.18215", "near 1"]),
    ],
)
def test_latents_of_another_form_are_refused(tmp_path, changes, words):
    path = write_latents(tmp_path / "latents.hdf5", **changes)
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        LatentMoments(path, **FORM)
    for word in ["latents.hdf5", *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_scaled_latents_are_taken_when_the_scale_says_so(tmp_path):
    path = write_latents(tmp_path / "latents.hdf5", latents=_moments() * np.float32(0.18215))
    assert len(LatentMoments(path, **{**FORM, "scale": 1.0})) == 40


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.97])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = write_latents(tmp_path / "latents.hdf5")
    raw = path.read_bytes()
    path.write_bytes(raw[: kept if isinstance(kept, int) else int(kept * len(raw))])
    with pytest.raises(ValueError, match=r"cannot be read as HDF5 .* damaged or incomplete"):
        LatentMoments(path, **FORM)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.hdf5 does not exist; set data\.path"):
        LatentMoments(tmp_path / "nowhere.hdf5", **FORM)
