"""Folders of images: what is read, what is left out and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import tiny_config, write_images

from soflow_fast import build
from soflow_fast.config import DataConfig
from soflow_fast.data import ImageFolder, batches
from soflow_fast.data.folder import labelled_images

SETTINGS = {"seed": 3, "num_classes": 0, "device": torch.device("cpu")}


def _write_image(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8), mode).save(path)


def test_folder_reads_classes_by_name_and_crops_the_centre(tmp_path):
    _write_image(tmp_path / "b" / "wide.png", np.tile(np.repeat([0, 255, 0], [4, 8, 4]), (8, 1)))
    _write_image(tmp_path / "a" / "deep" / "red.PNG", np.tile([255, 0, 0], (16, 16, 1)))
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    data = ImageFolder(tmp_path, channels=3, size=8, num_classes=2)
    assert [label for _, label in data] == [0, 1]
    red, wide = data[0][0], data[1][0]
    assert red.shape == wide.shape == (3, 8, 8)
    assert torch.equal(red, torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 8, 8))
    assert torch.equal(wide, torch.ones(3, 8, 8))
    grey = ImageFolder(tmp_path, channels=1, size=4, num_classes=0)[1][0]
    assert torch.equal(grey, torch.ones(1, 4, 4))


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_of_16_bits_are_read_to_the_nearest_of_8(tmp_path, channels):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    _write_image(tmp_path / "0.png", levels)
    for number, rounded in ((1, 0), (2, 128), (3, -128)):  # byte k is 257·k, and the rounding is at ± 128.5
        wide = (levels.astype(np.int64) * 257 + rounded).clip(0, 65535).astype(np.uint16)
        Image.fromarray(wide).save(tmp_path / f"{number}.png")
    data = ImageFolder(tmp_path, channels=channels, size=16, num_classes=0)
    assert Image.open(tmp_path / "1.png").mode.startswith("I")
    assert data[0][0].unique().numel() == 256
    for number in (1, 2, 3):
        assert torch.equal(data[number][0], data[0][0])


def test_a_flat_folder_has_no_classes(tmp_path):
    _write_image(tmp_path / "x.png", np.zeros((8, 8)))
    data = ImageFolder(tmp_path, channels=1, size=8, num_classes=0)
    assert [label for _, label in data] == [0]
    with pytest.raises(ValueError, match=r"or set model\.num_classes=0 for images without classes"):
        ImageFolder(tmp_path, channels=1, size=8, num_classes=10)


def test_folder_refusals(tmp_path):
    form = {"channels": 3, "size": 8, "num_classes": 1}
    with pytest.raises(ValueError, match=r"does not exist; set data\.path"):
        ImageFolder(tmp_path / "nowhere", **form)
    with pytest.raises(ValueError, match="holds no images"):
        ImageFolder(tmp_path, **form)
    _write_image(tmp_path / "a" / "x.png", np.zeros((8, 8)))
    (tmp_path / "a" / "y.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match=r"model\.in_channels=2 does not fit images"):
        ImageFolder(tmp_path, channels=2, size=8, num_classes=1)
    with pytest.raises(ValueError, match=r"y\.png cannot be read .*; repair or remove it"):
        list(batches(ImageFolder(tmp_path, **form), steps=range(1), batch=2, workers=1, **SETTINGS))
    _write_image(tmp_path / "b" / "x.png", np.zeros((8, 8)))
    with pytest.raises(ValueError, match=r"2 class folders, outside the classes 0\.\.0; set model\.num_classes=2"):
        ImageFolder(tmp_path, **form)
    for name in "cdefgh":
        (tmp_path / name).mkdir()
    with pytest.raises(
        ValueError, match=r"6 of the 8 class folders in .* hold no images \(c, d, e, f, g, \.\.\); remove"
    ):
        ImageFolder(tmp_path, **{**form, "num_classes": 8})


def test_hidden_folders_are_no_classes_and_hidden_files_no_images(tmp_path):
    for name in (".cache/x", "__MACOSX/x", "a/x", "a/._x", "a/.ipynb_checkpoints/x", "b/deep/x", "b/__MACOSX/x"):
        _write_image(tmp_path / f"{name}.png", np.zeros((8, 8)))
    data = ImageFolder(tmp_path, channels=1, size=8, num_classes=2)
    assert data.classes == ["a", "b"]
    assert [label for _, label in data] == [0, 1]
    assert len(ImageFolder(tmp_path, channels=1, size=8, num_classes=0)) == 2


def test_a_folder_of_other_files_is_told_which_are_read(tmp_path):
    _write_image(tmp_path / "a" / "x.tif", np.zeros((8, 8)))
    with pytest.raises(ValueError, match=r"holds no images \(\.bmp, \.jpeg, \.jpg, \.png, \.webp\); put them in one"):
        ImageFolder(tmp_path, channels=1, size=8, num_classes=1)


def test_what_is_left_out_for_its_suffix_is_said_once(tmp_path, monkeypatch, caplog):
    for name in ("a/x.png", "a/x.tif", "a/deep/y.TIF", "b/x.jpg", "b/.hidden/x.tif", "b/n01.v2/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "LICENSE").touch()
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert len(ImageFolder(tmp_path, channels=1, size=8, num_classes=2)) == 3
    assert caplog.messages == [
        "files of other suffixes than .bmp, .jpeg, .jpg, .png, .webp are left out of the image folder "
        f"{tmp_path}: 2 .tif, 1 without suffix"
    ]
    (tmp_path / "b" / "LICENSE").unlink()
    caplog.clear()
    ImageFolder(tmp_path / "b", channels=1, size=8, num_classes=0)
    assert caplog.messages == []


def test_images_outside_of_class_folders_are_said_to_be(tmp_path):
    _write_image(tmp_path / "x.png", np.zeros((8, 8)))
    with pytest.raises(ValueError, match="holds its images in no class folders; put them in one folder per class, or"):
        ImageFolder(tmp_path, channels=1, size=8, num_classes=1)


def test_a_folder_of_fewer_classes_is_said(tmp_path, caplog):
    write_images(tmp_path)
    config = tiny_config("unused")
    config = replace(config, model=replace(config.model, in_channels=3))
    build.check_dataset(config, ImageFolder(tmp_path, channels=3, size=8, num_classes=10))
    assert caplog.messages == ["2 of 10 classes have samples in the data; set model.num_classes=2"]
    caplog.clear()
    config = replace(config, model=replace(config.model, num_classes=0))
    build.check_dataset(config, ImageFolder(tmp_path, channels=3, size=8, num_classes=0))
    assert caplog.messages == []


def test_images_are_mirrored_at_random_by_the_step(tmp_path):
    for number, level in enumerate(np.random.default_rng(0).integers(0, 256, (8, 4, 4), np.uint8)):
        _write_image(tmp_path / f"{number}.png", level)
    config = tiny_config("unused", data=DataConfig(kind="folder", path=str(tmp_path), flip=True))
    config = replace(config, model=replace(config.model, input_size=4, patch_size=2, num_classes=0))
    plain = replace(config, data=replace(config.data, flip=False))
    drawn, again, straight = (
        torch.cat([x for x, _ in batches(build.build_dataset(of), batch=8, steps=steps, **SETTINGS, **options)])
        for of, steps, options in (
            (config, range(6), {}),
            (config, range(6), {"workers": 1}),
            (plain, range(6), {}),
        )
    )
    assert torch.equal(drawn, again)
    mirrored = (drawn == straight.flip(-1)).flatten(1).all(dim=1)
    assert torch.equal(torch.where(mirrored[:, None, None, None], straight.flip(-1), straight), drawn)
    assert 12 <= mirrored.sum() <= 36  # of 48
    assert len(mirrored.view(6, 8).unique(dim=0)) == 6


@pytest.mark.parametrize("kind", ["latents", "digits", "cifar10", "given"])
def test_mirroring_of_what_is_no_folder_is_refused(kind):
    with pytest.raises(ValueError, match=rf"data\.flip=True does nothing with data\.kind='{kind}'; leave it out"):
        DataConfig(kind=kind, flip=True)


def test_links_are_followed_up_to_where_they_lead_back(tmp_path, caplog):
    """A folder that is linked twice counts twice; what is no file is no image, and broken links are said."""
    _write_image(tmp_path / "elsewhere" / "deep" / "z.png", np.zeros((8, 8)))
    _write_image(tmp_path / "data" / "a" / "x.png" / "y.png", np.zeros((8, 8)))
    a = tmp_path / "data" / "a"
    for name, target in (("l1", "../../elsewhere"), ("l2", "../../elsewhere"), ("m.png", "l1/deep/z.png")):
        (a / name).symlink_to(target)
    for name, target in (("back", "."), ("up", ".."), ("lost.png", "nowhere.png"), ("self.png", "self.png")):
        (a / name).symlink_to(target)
    (tmp_path / "data" / "b").symlink_to("../elsewhere")
    with_up = ["a/l1/deep/z.png", "a/l2/deep/z.png", "a/m.png", "a/up/b/deep/z.png", "a/x.png/y.png", "b/deep/z.png"]
    assert labelled_images(tmp_path / "data", ["a", "b"]) == [(name, int(name[0] == "b")) for name in with_up]
    assert [message.partition(str(tmp_path))[2] for message in caplog.messages] == ["/data: 2 broken links"]
    data = ImageFolder(tmp_path / "data", channels=1, size=8, num_classes=2)
    assert [len(image) for image, _ in data] == [1] * 6


def test_the_order_is_that_of_the_parts_of_paths(tmp_path, monkeypatch):
    """Of trees without links it must stay what it was: the records of a run's data are of it."""
    names = ("b/c.png", "b.png", "b-/x.png", "b/a/x.JPG", "a.b/x.png", "a/x.png", "B.png", "é.webp", "b/ä/x.png")
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    folder = tmp_path / "data"
    expected = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
    assert [name for name, _ in labelled_images(folder, [""])] == expected
    monkeypatch.chdir(folder)
    assert [name for name, _ in labelled_images(Path(), [""])] == expected
    assert [name for name, _ in labelled_images(Path(), ["b"])] == [name for name in expected if name[:2] == "b/"]
