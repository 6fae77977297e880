"""From a configuration to its objects."""

import dataclasses
import inspect
import re

import pytest
import torch
from runs import Blobs, tiny_config

from soflow_fast import DiT, TrainConfig, Trainer, build, load_run
from soflow_fast.config import OBJECTIVE_SECTIONS, ModelConfig


def test_every_objective_has_a_section_with_exactly_its_arguments():
    assert OBJECTIVE_SECTIONS.keys() == build.OBJECTIVES.keys()
    for name, section in OBJECTIVE_SECTIONS.items():
        arguments = set(inspect.signature(build.OBJECTIVES[name]).parameters) - {"net", "impl"}
        assert {f.name for f in dataclasses.fields(section)} == arguments


@pytest.mark.parametrize("objective", ["soflow", "meanflow", "improved_meanflow", "alphaflow", "scm", "flow_matching"])
def test_initialisation_is_a_function_of_the_seed_alone(tmp_path, objective):
    config = tiny_config(tmp_path, objective=objective)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build.build_model(config).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = build.build_model(config).state_dict()
    other = build.build_model(dataclasses.replace(config, seed=1)).state_dict()
    name = "network.blocks.0.attn.qkv.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize(("label_drop", "num_classes", "rows"), [(0.1, 10, 11), (0.0, 10, 10), (0.0, 0, 1)])
def test_the_label_table_has_a_null_row_only_where_one_is_used(label_drop, num_classes, rows):
    sizes = ModelConfig(input_size=8, in_channels=1, num_classes=num_classes, hidden_size=16, depth=1, num_heads=2)
    net = build.build_network(sizes, label_drop)
    assert net.y_embedder.embedding_table.num_embeddings == rows


def test_sizes_replace_the_presets():
    net = build.build_network(ModelConfig(preset="DiT-B/4", depth=1, num_heads=6, num_classes=3), 0.1)
    assert (net.patch_size, net.hidden_size, net.depth, net.num_heads, net.num_classes) == (4, 768, 1, 6, 3)


def test_the_mlp_ratio_is_the_presets_own():
    sizes = {"input_size": 8, "hidden_size": 12, "depth": 1, "num_heads": 2}
    assert ModelConfig(mlp_ratio=4.0) == ModelConfig()  # as earlier configurations have it
    for preset, given, built in (
        ("DiT-B/4", {}, 4),
        ("DiT-B/4", {"mlp_ratio": 2.0}, 2),
        ("MiT-B/2", {"head_depth": 1}, 8 / 3),
        ("MiT-B/2", {"head_depth": 1, "mlp_ratio": 4.0}, 4),
    ):
        assert build.build_network(ModelConfig(preset=preset, **sizes, **given), 0.1).mlp_ratio == built


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"model": {"num_heads": 7}}, ["num_heads=7", "hidden_size=768"]),
        ({"model": {"patch_size": 5}}, ["patch_size=5", "input_size=32"]),
        ({"model": {"preset": "DiT-Q/4"}}, ["DiT-Q/4", "choose one of DiT-{S,B,M,L,XL}/{1,2,4,8,16,32}"]),
        ({"model": {"attention": "flash_attn"}}, ["attention='flash_attn'", "flash-attn", "attention='sdpa'"]),
        ({"model": {"preset": "given"}}, ["given to the Trainer"]),
        ({"soflow": {"label_drop": 0.0}}, ["guidance_scale=3.0", "label_drop"]),
        ({"soflow": {"gap_end": 0.0}}, ["gap_end=0.0", "(0, 1]"]),
        ({"soflow": {"path": "straight"}}, ["path='straight'", "linear"]),
    ],
)
def test_models_that_cannot_be(raw, words):
    config = TrainConfig.from_dict({**raw, "model": {"depth": 1, **raw.get("model", {})}})
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        build.build_model(config)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("device", "words"),
    [("gpu", "device='gpu' is not known"), ("cuda:x", "device='cuda:x' is not known"), ("cuda:99", "device='cuda:99'")],
)
def test_devices_that_cannot_be(device, words):
    with pytest.raises(ValueError, match=words):
        build.resolve_device(device)


def test_a_gpu_that_torch_cannot_use_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "_DRIVER", tmp_path / "version")
    assert build.resolve_device("auto") == torch.device("cpu")
    assert not caplog.records
    build._DRIVER.write_text("NVRM version: 535")
    assert build.resolve_device("auto") == torch.device("cpu")
    (record,) = caplog.records
    assert "there is an NVIDIA driver, and torch, built for CUDA 13.0, finds no GPU" in record.getMessage()
    build.resolve_device("cpu")
    assert len(caplog.records) == 1


def test_data_that_does_not_fit_the_model(tmp_path):
    config = tiny_config(tmp_path)
    assert build.check_dataset(config, Blobs(shape=(1, 8, 8))) is None
    assert build.check_dataset(config, _Items([(torch.rand(2, 8, 8), 1)] * 20)) == 0.18215
    with pytest.raises(ValueError, match=re.escape("samples of shape (3, 8, 8) and the model takes (1, 8, 8)")):
        build.check_dataset(config, Blobs(shape=(3, 8, 8)))
    with pytest.raises(ValueError, match="batch_size=16 is more than the 9 samples"):
        build.check_dataset(config, Blobs(n=9))
    with pytest.raises(ValueError, match=r"data\.path is missing"):
        build.build_dataset(TrainConfig())


class _Items(list):
    """A data set of these items."""


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (torch.zeros(1, 8, 8), "yields (torch.float32 of shape (1, 8, 8)); each item must be a pair"),
        ((torch.zeros(1, 8, 8), 1, 2), "yields (torch.float32 of shape (1, 8, 8), int, int); each item must be a pair"),
        ({"image": 1}, "yields (dict); each item must be a pair"),
        (("picture", 1), "yields (str, int); each item must be a pair"),
        ((torch.zeros(1, 8, 8), "cat"), "yields (torch.float32 of shape (1, 8, 8), str); each item must be a pair"),
        ((torch.zeros(1, 8, 8), torch.zeros(10)), "(1, 8, 8), torch.float32 of shape (10,)); each item must be a pair"),
        ((torch.zeros(1, 8, 8, dtype=torch.uint8), 1), "samples of torch.uint8"),
    ],
)
def test_items_that_are_no_pairs_are_refused(item, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        build.check_dataset(tiny_config("unused"), _Items([item] * 16))


def test_labels_are_not_looked_at_without_classes():
    config = tiny_config("unused")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=0))
    assert build.check_dataset(config, _Items([(torch.zeros(1, 8, 8), "cat")] * 16)) is None


def test_a_data_set_without_a_length_is_refused():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield torch.zeros(1, 8, 8), 1

    with pytest.raises(ValueError, match="the data set Stream has no length; give a map-style one"):
        build.check_dataset(tiny_config("unused"), Stream())


def test_a_network_given_as_an_object_is_used():
    net = DiT(8, 4, 1, 16, 1, 2, num_classes=10)
    assert build.build_model(TrainConfig(), net).network is net


def test_float8_guidance_is_a_part_of_a_run(tmp_path):
    """Its weights are others than those of a plain one, which it does not become midway."""
    trained = []
    for name in ("rounded", "plain"):
        config = tiny_config(tmp_path / name, total_steps=4)
        trainer = Trainer(
            dataclasses.replace(config, model=dataclasses.replace(config.model, float8_guidance=name == "rounded"))
        )
        trainer.fit()
        trained.append(trainer.model.network.final_layer.linear.weight)
    torch.testing.assert_close(*trained, rtol=0.1, atol=1e-3)
    assert not torch.equal(*trained)
    config, model, _ = load_run(tmp_path / "rounded")
    assert model.network.float8_guidance
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, float8_guidance=False))
    with pytest.raises(ValueError, match=r"model\.float8_guidance"):
        Trainer(plain).fit()
