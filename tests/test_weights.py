"""Starting from given weights: where they may lie and how they may be named, and runs that start from them."""

import re
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import Blobs, StopError, assert_bitwise_equal, final, stop_at, tiny_config, write_config
from safetensors.torch import save_file
from torch import nn

from soflow_fast import DiT, SoFlow, Trainer, TrainStep, checkpoint
from soflow_fast.cli import main
from soflow_fast.config import FlowMatchingConfig, SoFlowConfig
from soflow_fast.ema import EMA
from soflow_fast.optim import AdamW
from soflow_fast.weights import load_weights, read_weights


def _network(seed=0, depth=1):
    """The network of :func:`runs.tiny_config`, with all weights drawn."""
    net = DiT(8, 4, 1, 16, depth, 2, num_classes=10)
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.normal_(std=0.1, generator=generator)
    return net


def _save(file, value, **options):
    if file.suffix == ".safetensors":
        save_file(value, file)
    else:
        torch.save(value, file, **options)
    return file


def _prefixed(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


def _equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------ files and names


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("prefix", ["", "network.", "module.", "_orig_mod.module.network."])
def test_files_of_an_objective_or_a_network_into_either(tmp_path, suffix, prefix):
    theirs = _network(1).state_dict()
    file = _save(tmp_path / f"weights{suffix}", _prefixed(theirs, prefix))
    for model in (SoFlow(_network()), _network()):
        assert load_weights(model, file) == str(file)
        assert _equal(getattr(model, "network", model).state_dict(), theirs)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["model", "ema"], "ema"),
        (["ema_model", "model"], "ema_model"),
        (["state_dict"], "state_dict"),
        (["model_state_dict", "model_state_dict_of_a_critic"], "model_state_dict"),
        (["my_weights"], "my_weights"),
    ],
)
def test_one_of_several_in_a_file(tmp_path, names, taken, legacy):
    model, theirs = SoFlow(_network()), {name: SoFlow(_network(i)).state_dict() for i, name in enumerate(names, 1)}
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.step()
    rest = {"optimizer": optimizer.state_dict(), "step": 3, "args": Namespace(lr=1e-4)}
    file = _save(tmp_path / "all.pth", rest | theirs, _use_new_zipfile_serialization=not legacy)
    assert load_weights(model, file) == f"{taken!r} of {file}"
    assert _equal(model.state_dict(), theirs[taken])


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_file_is_mapped_and_not_read(tmp_path, name):
    file = _save(tmp_path / name, _network(1).state_dict())
    weights, _ = read_weights(SoFlow(_network()), file)
    assert str(file) in Path("/proc/self/maps").read_text()
    del weights
    assert str(file) not in Path("/proc/self/maps").read_text()


class _WithBuffers(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        nn.init.constant_(self.norm.weight, value)
        self.norm.running_mean.fill_(value)


def test_the_averages_of_a_run_or_of_one_checkpoint_with_the_buffers(tmp_path):
    for step in (1, 2):
        theirs = _WithBuffers(step)
        averages = EMA(theirs)
        averages.averages["norm.weight"].fill_(10 + step)
        state = checkpoint.State(
            step, theirs.state_dict(), averages.state_dict(), {}, {}, ema_updates=1, skipped_steps=0
        )
        checkpoint.save(tmp_path / "run" / "checkpoints", state, keep=2)
    first, second = checkpoint.committed(tmp_path / "run" / "checkpoints")
    for path, taken, step in ((tmp_path / "run", second, 2), (first, first, 1)):
        model = _WithBuffers(0)
        assert load_weights(model, path) == f"the averages of {taken}"
        assert (model.norm.weight == 10 + step).all()
        assert (model.norm.running_mean == step).all()


def test_averages_of_parameters_alone_take_the_buffers_of_the_others(tmp_path):
    theirs = _WithBuffers(3)
    ema = {name: p + 1 for name, p in theirs.named_parameters()}
    file = _save(tmp_path / "x.pt", {"model": theirs.state_dict(), "ema": ema})
    model = _WithBuffers(0)
    assert load_weights(model, file) == f"'ema' of {file}"
    assert (model.norm.weight == 4).all()
    assert (model.norm.running_mean == 3).all()


def test_the_averages_in_the_state_of_a_step(tmp_path):
    """Of a loop of one's own, as the README has it."""
    model = SoFlow(_network())
    ema = EMA(model, 0.9)
    step = TrainStep(model, optimizer=AdamW(model.parameters(), lr=0.1), ema=ema, total_steps=2)
    step(torch.randn(4, 1, 8, 8), torch.arange(4))
    file = _save(tmp_path / "own.pt", {"model": model.state_dict(), "step": step.state_dict()})
    other = SoFlow(_network(1))
    assert load_weights(other, file) == f"'ema' of {file}"
    assert _equal(other.state_dict(), ema.state_dict())
    assert not _equal(other.state_dict(), model.state_dict())


def test_an_averaged_model_of_torch(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(_WithBuffers(5))
    model = _WithBuffers(0)
    load_weights(model, _save(tmp_path / "x.pt", averaged.state_dict()))
    assert (model.norm.weight == 5).all()


class _Code:
    pass


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x.pt", None, ["x.pt do not exist", "give a .safetensors file"]),
        ("x.pt", b"", ["x.pt cannot be read", "tensors and numbers alone"]),
        ("x.pt", b"no weights at all", ["x.pt cannot be read"]),
        ("x.safetensors", b"no weights at all", ["x.safetensors cannot be read"]),
        ("x.pt", {"model": {"network.w": torch.zeros(1)}, "config": _Code()}, ["x.pt cannot be read (Weights only"]),
        ("x.pt", [torch.zeros(1)], ["x.pt holds no weights", "such as ema or model"]),
        ("x.pt", {"step": 3, "model": {}}, ["x.pt holds no weights"]),
        ("x.pt", {name: {"w": torch.zeros(1)} for name in "ab"}, ["x.pt holds weights under a, b; give one"]),
        ("folder", {}, ["folder holds no checkpoint of a run"]),
        ("x.pt", {"w": torch.zeros(1)}, ["x.pt is of another model: network.blocks.0", "missing there"]),
        ("x.pt", _network(depth=2).state_dict(), ["network.blocks.1.", "missing in this model"]),
        ("x.pt", _network().state_dict() | {"x_embedder.proj.bias": torch.zeros(7)},
         ["x.pt is of another model: network.x_embedder.proj.bias is (7,) there and (16,) in this model"]),
        ("x.pt", _network().state_dict() | {"x_embedder.proj.bias": torch.full((16,), torch.nan)},
         ["x.pt has in network.x_embedder.proj.bias values that are not finite"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence_and_changes_nothing(tmp_path, name, value, words):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif isinstance(value, bytes):
        path.write_bytes(value)
    elif value is not None:
        _save(path, value)
    model = SoFlow(_network())
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        load_weights(model, path)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert _equal(model.network.state_dict(), _network().state_dict())


def test_a_file_that_is_cut_short(tmp_path):
    for name in ("x.pt", "x.safetensors"):
        file = _save(tmp_path / name, _network().state_dict())
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            load_weights(_network(), file)


# ----------------------------------------------------------------------------------------------------------- runs


def _stopped_before(monkeypatch, step, trainer):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(StopError):
            trainer.fit()
    return trainer


def test_soflow_from_flow_matching(tmp_path, monkeypatch, capsys):
    flow = FlowMatchingConfig(label_drop=0.1)
    Trainer(tiny_config(tmp_path / "flow", objective="flow_matching", flow_matching=flow)).fit()
    averages = final(tmp_path / "flow").ema
    assert not _equal(averages, final(tmp_path / "flow").model)
    config = tiny_config(tmp_path / "run", seed=5, initial_weights=str(tmp_path / "flow"))
    run = _stopped_before(monkeypatch, 1, Trainer(config))
    assert _equal(run.model.state_dict(), averages)
    assert _equal(run.ema.state_dict(), averages)
    assert run.ema.updates == 0
    newest = tmp_path / "flow" / "checkpoints" / "step-00000006"
    assert f"initial weights: the averages of {newest}\n" in capsys.readouterr().err
    Trainer(config).fit()
    assert not _equal(final(tmp_path / "run").model, averages)


def test_a_run_that_goes_on_does_not_need_the_file(tmp_path, monkeypatch):
    file = _save(tmp_path / "weights.pt", _network(1).state_dict())
    config = tiny_config(tmp_path / "straight", initial_weights=str(file))
    Trainer(config).fit()
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    _stopped_before(monkeypatch, 6, Trainer(stopped))
    file.unlink()
    assert main(["train", str(write_config(tmp_path / "config.yaml", stopped)), "--dry-run"]) == 0
    Trainer(stopped).fit()
    assert_bitwise_equal(final(tmp_path / "straight"), final(tmp_path / "stopped"))
    with pytest.raises(ValueError, match=r"initial_weights='.*', and this one has None"):
        Trainer(replace(stopped, initial_weights=None)).fit()


def test_a_given_network_starts_from_them(tmp_path, monkeypatch):
    theirs = _network(1).state_dict()
    config = tiny_config(tmp_path / "run", initial_weights=str(_save(tmp_path / "x.safetensors", theirs)))
    for given in (_network(), SoFlow(_network())):
        run = _stopped_before(monkeypatch, 1, Trainer(config, model=given, dataset=Blobs()))
        assert _equal(run.model.network.state_dict(), theirs)
        shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
@pytest.mark.parametrize("value", ["nowhere.pt", "deeper.pt"])
def test_the_command_refuses_and_writes_nothing(tmp_path, capsys, monkeypatch, dry_run, value):
    monkeypatch.chdir(tmp_path)
    _save(tmp_path / "deeper.pt", _network(depth=2).state_dict())
    config = write_config(tmp_path / "config.yaml", tiny_config("run", soflow=SoFlowConfig()))
    assert main(["train", str(config), *dry_run, "--initial_weights", value]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("soflow: ")
    assert value in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------ other classes, other resolution


def _other(tmp_path, config, **model):
    return replace(
        config,
        run_dir=str(tmp_path / "other"),
        initial_weights=str(tmp_path / "first"),
        model=replace(config.model, **model),
    )


def test_fine_tuning_to_other_classes(tmp_path, monkeypatch, capsys):
    first = tiny_config(tmp_path / "first")
    Trainer(first).fit()
    averages = final(tmp_path / "first").ema
    config = _other(tmp_path, first, num_classes=12)
    with pytest.raises(ValueError, match=r"the checkpoint .* is of another model: network\.y_embedder\.") as error:
        Trainer(config).fit()
    assert "the averages" not in str(error.value)
    config = replace(config, initial_weights_except=("y_embedder",))
    drawn = Trainer(config).model.network.y_embedder.embedding_table.weight.clone()
    run = _stopped_before(monkeypatch, 1, Trainer(config))
    assert "kept as initialised: y_embedder\n" in capsys.readouterr().err
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, drawn if "y_embedder" in name else averages[name])
        assert torch.equal(value, run.ema.state_dict()[name])
    assert main(["train", str(write_config(tmp_path / "c.yaml", config)), "--dry-run"]) == 0


def test_fine_tuning_to_another_resolution(tmp_path, monkeypatch, capsys):
    first = tiny_config(tmp_path / "first")
    Trainer(first).fit()
    averages = final(tmp_path / "first").ema
    config = _other(tmp_path, first, input_size=16)
    table = Trainer(config, dataset=Blobs(shape=(1, 16, 16))).model.network.pos_embed.clone()
    run = _stopped_before(monkeypatch, 1, Trainer(config, dataset=Blobs(shape=(1, 16, 16))))
    assert "kept as initialised: pos_embed\n" in capsys.readouterr().err
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, table if name == "network.pos_embed" else averages[name])


def test_another_grid_of_as_many_tokens(tmp_path, monkeypatch, capsys):
    """2×2 and 1×4 tokens have tables of one shape, and not of one content."""
    first = tiny_config(tmp_path / "first")
    Trainer(first).fit()
    averages, data = final(tmp_path / "first").ema, Blobs(shape=(1, 4, 16))
    config = _other(tmp_path, first, input_size=(4, 16))
    table = Trainer(config, dataset=data).model.network.pos_embed.clone()
    assert table.shape == averages["network.pos_embed"].shape
    run = _stopped_before(monkeypatch, 1, Trainer(config, dataset=data))
    assert "kept as initialised: pos_embed\n" in capsys.readouterr().err
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, table if name == "network.pos_embed" else averages[name])
    goes_on = Trainer(replace(config, run_dir=first.run_dir, initial_weights=None), dataset=data, accept_changes=True)
    with pytest.raises(ValueError, match=r"network\.pos_embed is the table of another grid .* as initial_weights"):
        goes_on.fit()


@pytest.mark.parametrize("error", [0.0, 2e-3])
def test_a_table_is_that_of_its_grid_or_of_none(tmp_path, error):
    """Rounded it still is; a table of another kind that is not trained is taken as it is."""
    ours, theirs = (DiT(8, 2, 1, 16, 1, 2, num_classes=10) for _ in range(2))
    theirs.pos_embed.data += error * torch.randn(theirs.pos_embed.shape)
    file = _save(tmp_path / "x.pt", theirs.state_dict())
    load_weights(ours, file)
    assert torch.equal(ours.pos_embed, theirs.pos_embed)
    other = theirs.state_dict() | {"pos_embed": theirs.pos_embed.flip(2)}  # the row first
    load_weights(ours, _save(tmp_path / "y.pt", other))
    assert torch.equal(ours.pos_embed, other["pos_embed"])


class _Positions(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(n))


def test_positions_that_are_trained_are_not_left_out(tmp_path):
    file = _save(tmp_path / "x.pt", _Positions(3).state_dict())
    with pytest.raises(ValueError, match=r"of another model: pos_embed is \(3,\) there"):
        load_weights(_Positions(4), file)
    load_weights(_Positions(4), file, keep=["pos_embed"])


def test_parts_to_keep_are_whole_names(tmp_path):
    deep, theirs = _network(depth=11), _network(1, depth=11)
    file = _save(tmp_path / "x.pt", theirs.state_dict())
    own = {name: value.clone() for name, value in deep.state_dict().items()}
    assert load_weights(deep, file, ["network.blocks.1", "final_layer"]).endswith("network.blocks.1, final_layer")
    for name, value in deep.state_dict().items():
        kept = name.startswith(("blocks.1.", "final_layer."))
        assert torch.equal(value, own[name] if kept else theirs.state_dict()[name])
    with pytest.raises(ValueError, match=r"initial_weights_except has 'y_embed', which .*; choose of .*y_embedder"):
        load_weights(deep, file, ["y_embed"])
    with pytest.raises(ValueError, match="does nothing without initial_weights"):
        tiny_config(tmp_path, initial_weights_except=("y_embedder",))


# ------------------------------------------------------------------------------------------------- what is not used


def _told(caplog):
    found = [(record.levelname, record.getMessage()) for record in caplog.records if "weights" in record.name]
    caplog.clear()
    return found


def test_weights_that_are_not_used_are_told(tmp_path, caplog):
    caplog.set_level("INFO")
    theirs = _network(1).state_dict()
    beside = {f"head.{name}": torch.zeros(2) for name in "abcd"}
    whole = _prefixed(theirs, "network.")
    file = _save(tmp_path / "x.pt", {"model": whole | beside, "ema": whole | {"n_averaged": torch.tensor(3)} | beside})
    n = len(theirs)
    for model in (SoFlow(_network()), _network()):
        load_weights(model, file)
        said = f"'ema' of {file}: 4 of the {n + 5} weights there are not used (head.a, head.b, head.c, ...)"
        assert _told(caplog) == [("WARNING", said)]
    file = _save(tmp_path / "y.safetensors", _prefixed(whole | {"head.a": torch.zeros(2)}, "module."))
    load_weights(_network(), file, keep=["x_embedder"])
    names = "x_embedder.proj.bias, x_embedder.proj.weight"
    said = f"1 of the {n + 1} weights there are not used (module.head.a), and 2 of the model's {n} stay as they are"
    assert _told(caplog) == [("WARNING", f"{file}: {said} ({names})")]


def test_weights_that_stay_are_told_and_nothing_where_all_are_used(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    file = _save(tmp_path / "x.pt", _network(1).state_dict())
    load_weights(SoFlow(_network()), file)
    assert _told(caplog) == []
    wide = DiT(16, 4, 1, 16, 1, 2, num_classes=12)  # of another grid and of other classes
    load_weights(wide, file, keep=["y_embedder"])
    names = "pos_embed, y_embedder.embedding_table.weight"
    assert _told(caplog) == [("INFO", f"{file}: 2 of the model's {len(wide.state_dict())} stay as they are ({names})")]
    told = DiT(8, 4, 1, 16, 1, 2, num_classes=0, embedding_dim=5)  # classes have no null_condition
    load_weights(told, file, keep=["y_embedder"])
    names = "null_condition, y_embedder.mlp.0.bias, y_embedder.mlp.0.weight, ..."
    assert _told(caplog) == [("INFO", f"{file}: 5 of the model's {len(told.state_dict())} stay as they are ({names})")]
    monkeypatch.setenv("RANK", "1")
    load_weights(told, file, keep=["y_embedder"])
    assert _told(caplog) == []
