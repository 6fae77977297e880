"""The command line: one sentence and exit code 2 for bad input, and what the commands print and write."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    pixel_features,
    refused,
    soflow,
    tiny_config,
    write_config,
    write_images,
    write_latents,
    write_statistics,
)
from test_interop import IMAGENET

from soflow_fast import Trainer, cli, trainer
from soflow_fast.cli import main
from soflow_fast.config import DataConfig, ModelConfig

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on the digits."""
    folder = tmp_path_factory.mktemp("run")
    Trainer(tiny_config(folder)).fit()
    return folder


def _files(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["config.yaml", "does not exist"]),
        ("", ["config.yaml", "is empty"]),
        ("model: [", ["config.yaml", "not valid YAML"]),
        ("modell:\n  depth: 1\n", ["modell.depth", "model.depth"]),
        ("batch_size: 0\n", ["batch_size=0", "at least 1"]),
        ("optimizer:\n  learning_rate: -1e-4\n", ["optimizer.learning_rate=-0.0001", "greater than 0"]),
        ("model:\n  num_heads: 7\n", ["num_heads=7", "hidden_size=768"]),
        ("model:\n  patch_size: 5\n", ["patch_size=5", "input_size=32"]),
        ("soflow:\n  label_drop: 0\n", ["guidance_scale=3.0", "label_drop > 0"]),
        ("soflow:\n  gap_end: 0\n", ["gap_end=0.0", "(0, 1]"]),
        ("model:\n  attention: flash_attn\n", ["attention='flash_attn'", "attention='sdpa'"]),
        ("data:\n  path: nowhere.hdf5\nmodel: {depth: 1}\n", ["nowhere.hdf5", "does not exist"]),
        ("data: {kind: folder, path: nowhere}\nmodel: {depth: 1}\n", ["nowhere", "does not exist"]),
        (IMAGENET.replace("0.002", "0.0"), ["l_end_ratio=0.0"]),
        (IMAGENET.replace("cfg_drop_rate: 0.1", "cfg_drop_rate: 0"), ["cfg_scale=2.5", "set cfg_drop_rate > 0"]),
        (IMAGENET.replace("data_size: 32", "data_size: 33"), ["patch_size=2", "data_size=33"]),
        (IMAGENET.replace("DiT-XL-2", "UNet-2"), ["model_type", "UNet-2", "choose one of", "UNet"]),
    ],
)
def test_bad_configurations(tmp_path, capsys, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    before = _files(tmp_path)
    sentence = refused(capsys, "train", "config.yaml")
    for word in words:
        assert word in sentence
    assert _files(tmp_path) == before


@needs_no_gpu
def test_what_this_machine_cannot_do(tmp_path, capsys):
    path = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run"))
    for arguments, words in (
        (["--device", "cuda"], ["device='cuda'", "device=cpu"]),
        (["--compute.cuda_graph", "true"], ["cuda_graph=True", "cuda_graph=False"]),
    ):
        sentence = refused(capsys, "train", path, *arguments)
        assert all(word in sentence for word in words)
    result = soflow("train", str(path), "--model.impl", "triton")  # which Triton's interpreter would run
    assert result.returncode == 2
    assert re.fullmatch(r"soflow: .*impl='triton'.*impl='torch'.*\n", result.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": None}, ["no array 'labels'"]),
        ({"latents": np.zeros((40, 6, 8, 8), np.float32)}, ["(40, 6, 8, 8)", "(N, 8, 8, 8)"]),
        ({"labels": np.arange(40)}, ["outside the classes 0..9"]),
    ],
)
def test_bad_latents(tmp_path, capsys, changes, words):
    path = write_latents(tmp_path / "latents.hdf5", **changes)
    model = ModelConfig(input_size=8, num_classes=10, hidden_size=16, depth=1, num_heads=2)
    config = tiny_config(tmp_path / "run", model=model, data=DataConfig(path=str(path)))
    sentence = refused(capsys, "train", write_config(tmp_path / "config.yaml", config))
    for word in ["latents.hdf5", *words]:
        assert word in sentence
    assert not (tmp_path / "run").exists()


def test_a_truncated_latents_file(tmp_path, capsys):
    path = write_latents(tmp_path / "latents.hdf5")
    path.write_bytes(path.read_bytes()[:-1000])
    config = tiny_config(tmp_path / "run", data=DataConfig(path=str(path)))
    config = replace(config, model=replace(config.model, in_channels=4))
    assert "damaged or incomplete" in refused(capsys, "train", write_config(tmp_path / "config.yaml", config))


def test_a_run_of_another_config_is_refused_and_kept(run, tmp_path, capsys):
    path, before = write_config(tmp_path / "config.yaml", tiny_config(run, seed=9)), _files(run)
    assert "holds a run with seed=0, and this one has 9" in refused(capsys, "train", path)
    assert _files(run) == before


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    path = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "file" / "run"))
    assert str(tmp_path / "file" / "run") in refused(capsys, "train", path)


def test_bad_arguments_of_the_other_commands(run, tmp_path, capsys):
    assert "is not a run" in refused(capsys, "sample", tmp_path)
    assert "is not a run" in refused(capsys, "eval", tmp_path)
    assert "--count=0" in refused(capsys, "sample", run, "--count", 0)
    assert "--steps=0" in refused(capsys, "sample", run, "--steps", 0)
    assert "--labels '3,10'" in refused(capsys, "sample", run, "--labels", "3,10")
    for option in ("--reference", "--features", "--weights"):
        assert f"evaluation.{option[2:]}='x' does nothing here" in refused(capsys, "eval", run, option, "x")
    assert "evaluation.steps=0" in refused(capsys, "eval", run, "--steps", 0)
    assert "device='gpu'" in refused(capsys, "sample", run, "--device", "gpu")
    with pytest.raises(SystemExit) as stopped:
        main(["sample", str(run), "--cuont", "3"])
    assert stopped.value.code == 2


def test_a_damaged_checkpoint_is_refused(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", total_steps=1)
    weights = Trainer(config).fit() / "model.safetensors"
    capsys.readouterr()
    weights.write_bytes(weights.read_bytes()[:-1])
    path = write_config(tmp_path / "config.yaml", config)
    for command in (["train", path], ["sample", config.run_dir], ["eval", config.run_dir]):
        assert "is damaged (model.safetensors" in refused(capsys, *command)


# ------------------------------------------------------------------------------------------------------- commands


def test_train_with_overrides_in_a_process_of_its_own(tmp_path):
    path = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run"))
    result = soflow("train", str(path), "--total_steps", "3", "--optimizer.learning_rate=2e-3")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"done: {tmp_path / 'run' / 'checkpoints' / 'step-00000003'}\n"
    assert "velocity=" in result.stderr
    assert "images/s=" in result.stderr
    assert "learning_rate: 0.002" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    "line",
    [
        "train c.yaml --dry-run --accept-changes --total_steps 3 --soflow.time_mean=[1,2,3] --batch-size 4",
        "sample run_1 --ema-std 0.08 --guidance-scale=3 --guidance-interval 0.3,0.8 --no-renoise --out a_b",
        "eval run_1 --ema-std=0.08 --no-compile --reference x_y",
        "export run_1 a_b.pt2 --guidance-scale 3",
        "encode a_b c_d --vae=e_f --per-channel",
        "demo --run-dir a_b",
    ],
)
def test_options_may_have_underscores(line):
    """And only options of ours become others: names and values of the configuration, paths, what comes after --."""
    dashed = [*line.split(), *(["--", "--dry_run"] if line.startswith("train") else [])]
    ours = "dry-run accept-changes ema-std guidance-scale guidance-interval no-renoise no-compile per-channel run-dir"
    respelled = [name for name in ours.split() if f"--{name}" in line]
    underscored = dashed
    for name in respelled:
        underscored = [a.replace(f"--{name}", f"--{name.replace('-', '_')}") for a in underscored]
    assert sum(a != b for a, b in zip(dashed, underscored, strict=True)) == len(respelled) > 0
    assert cli._parser().parse_known_args(underscored) == cli._parser().parse_known_args(dashed)
    rest = cli._parser().parse_known_args(underscored)[1]
    if line.startswith("train"):
        assert rest[:5] == ["--total_steps", "3", "--soflow.time_mean=[1,2,3]", "--batch-size", "4"]
        assert rest[-1] == "--dry_run"
    else:
        assert rest == []


def test_a_run_is_planned_and_sampled_by_options_with_underscores(run, tmp_path, capsys):
    path = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "new"))
    assert main(["train", str(path), "--dry_run"]) == 0
    assert "parameters  " in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    assert "unknown key 'dry_runs'" in refused(capsys, "train", path, "--dry_runs", "1")
    assert "no snapshots to reconstruct the average of std 0.08" in refused(capsys, "sample", run, "--ema_std", "0.08")


def test_a_failure_to_load_the_data_stands_on_a_line_of_its_own(tmp_path, capsys, monkeypatch):
    def fails(*args, **options):
        raise ValueError("the data cannot be loaded")

    monkeypatch.setattr(trainer, "load_resident", fails)
    config = tiny_config(tmp_path / "run", data=DataConfig(kind="digits", workers=0, on_device=True))
    assert main(["train", str(write_config(tmp_path / "config.yaml", config))]) == 2
    assert capsys.readouterr().err.split("\n")[-2:] == ["soflow: the data cannot be loaded", ""]


@pytest.mark.parametrize(
    ("model", "parameters", "forward"), [("DiT-B-4", "131.2 M", 11.1), ("DiT-XL-2", "676.7 M", 237)]
)
def test_dry_run_of_a_published_file(tmp_path, capsys, monkeypatch, model, parameters, forward):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet.yaml").write_text(IMAGENET.replace("DiT-XL-2", model))
    write_latents(tmp_path / "imagenet_latent.hdf5", n=64, size=32)
    command = ["train", "imagenet.yaml", "--dry-run", "--batch_size", "64", "--device", "cpu"]
    assert "imagenet_latent does not exist; set dataset_path" in refused(capsys, *command)
    assert main([*command, "--data.path", "."]) == 0
    printed = capsys.readouterr().out
    assert f"preset: {model[:-2]}/{model[-1]}" in printed
    assert f"parameters              {parameters}\n" in printed
    flops = float(printed.split(" G per image")[0].split("(")[-1].replace(",", ""))
    assert flops == pytest.approx(4.5 * forward, rel=0.02)  # a step is 4.5 whole forwards
    # 22 bytes a weight; per token, channel and block 37 bytes in bfloat16 and 74 in float32
    depth, width, tokens = {"DiT-B-4": (12, 768, 64), "DiT-XL-2": (28, 1152, 256)}[model]
    gib = (22 * float(parameters.split()[0]) * 1e6 + 74 * 64 * tokens * width * depth) / 2**30
    assert float(printed.split("memory, estimated")[1].split()[0]) == pytest.approx(gib, rel=1e-2)
    for name, value in (("precision", "fp32"), ("compile", "False"), ("cuda_graph", "False"), ("recompute", "none")):
        assert f"{name:<24}{value}\n" in printed
    for line in ("device                  cpu", "attention               sdpa", "impl                    torch"):
        assert f"{line}\n" in printed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["imagenet.yaml", "imagenet_latent.hdf5"]


@needs_no_gpu
def test_dry_run_fails_where_training_would(tmp_path, capsys):
    path = write_config(tmp_path / "config.yaml", tiny_config(tmp_path / "run"))
    for option, words in (
        (["--compute.cuda_graph=true"], "cuda_graph=True needs the model on a CUDA GPU"),
        (["--batch_size=12", "--optimizer.accumulation=2"], "that is a multiple of 4"),
        (["--batch_size=2000"], "more than the 1347 samples"),
        (["--evaluation.every=1", "--evaluation.features=x"], "evaluation.features='x' does nothing here"),
    ):
        assert words in refused(capsys, "train", path, "--dry-run", *option)
    assert not (tmp_path / "run").exists()


def test_help_says_what_a_sampling_step_costs(capsys):
    for command in ("sample", "eval"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "each of one network call, or of flow_matching.ode_steps" in " ".join(capsys.readouterr().out.split())


def test_eval_of_the_digits(run, capsys):
    assert main(["eval", str(run), "--count", "40", "--steps", "2"]) == 0
    written = json.loads((run / "evaluation" / "step-00000006-2-step-40-samples.json").read_text())
    assert written["step"] == 6
    printed = capsys.readouterr().out
    for name in ("frechet_all", "frechet_held_out", "recognised", "memorisation"):
        assert f"{name:<20}{written[name]:.4f}" in printed


def test_evaluations_say_what_they_are_and_do_not_overwrite_each_other(run, capsys, caplog):
    folder, names = run / "evaluation", []
    for options in ([], ["--seed", "1"], ["--precision", "bf16"], ["--count", "65"], ["--no-renoise"]):
        before = _files(folder) if folder.exists() else {}
        caplog.clear()
        assert main(["eval", str(run), *options]) == 0
        assert ("20 samples are not more than the 64 features" in caplog.text) == ("--count" not in options)
        after = _files(folder)
        (new,) = after.keys() - before.keys()
        assert before.items() <= after.items()
        names.append(new.name.removeprefix("step-00000006-1-step-"))
        found = json.loads(new.read_text())
        about = [found[name] for name in ("count", "seed", "steps", "precision", "renoise", "features", "reference")]
        count, seed = 65 if "--count" in options else 20, 1 if "--seed" in options else 0
        precision = "bf16" if "bf16" in options else ("bf16" if torch.cuda.is_available() else "fp32")
        assert about == [count, seed, 1, precision, "--no-renoise" not in options, "pixels", "digits"]
    assert names == [
        "20-samples.json", "20-samples-seed-1.json", "20-samples-precision-bf16.json", "65-samples.json",
        "20-samples-renoise-false.json",
    ]  # fmt: skip


def test_eval_against_images_and_against_their_statistics(tmp_path, capsys):
    """More images than pixels: the covariances have full rank, and every order of the images scores the same."""
    levels = write_images(tmp_path / "real", n=240)
    config = tiny_config(tmp_path / "run", data=DataConfig(kind="folder", path=str(tmp_path / "real"), workers=0))
    Trainer(replace(config, model=replace(config.model, in_channels=3), total_steps=1)).fit()
    file = write_statistics(tmp_path / "real.npz", pixel_features(levels))
    command = ["eval", str(tmp_path / "run"), "--features", "pixels", "--count", "240", "--reference"]
    scores, names = [], set()
    for reference in (tmp_path / "real", file):
        assert main([*command, str(reference)]) == 0
        printed = capsys.readouterr().out
        written = Path(printed.split()[-1])
        names.add(re.sub("[0-9a-f]{6}[.]json$", "*", written.name))
        found = json.loads(written.read_text())
        assert (found["features"], found["reference"]) == ("pixels", str(reference))
        scores.append(found["frechet"])
        assert f"frechet             {scores[-1]:.4f}\n" in printed
    assert names == {"step-00000001-1-step-240-samples-pixels-reference-real-*"}
    assert len(list((tmp_path / "run" / "evaluation").glob("*.json"))) == 2
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)
    before = _files(tmp_path / "run")
    write_statistics(file, pixel_features(levels)[:, :64])
    assert "statistics of 64 features, and evaluation.features='pixels' gives 192" in refused(capsys, *command, file)
    assert "is neither a folder nor a .npz file" in refused(capsys, *command, written)
    assert "does not exist" in refused(capsys, *command, tmp_path / "nowhere.npz")
    assert _files(tmp_path / "run") == before


def test_latents_train_and_are_sampled_without_an_autoencoder(tmp_path, capsys):
    data = DataConfig(path=str(write_latents(tmp_path / "latents.hdf5")), workers=0)
    config = tiny_config(tmp_path / "run", data=data, total_steps=2)
    config = replace(config, model=replace(config.model, in_channels=4), output=replace(config.output, sample_every=2))
    assert main(["train", str(write_config(tmp_path / "config.yaml", config))]) == 0
    assert "no autoencoder is set (data.vae), so samples stay latents" in capsys.readouterr().err
    assert np.load(tmp_path / "run" / "samples" / "step-00000002.npy").shape == (10, 4, 8, 8)
    assert main(["sample", str(tmp_path / "run"), "--count", "3"]) == 0
    assert "3 latents (no autoencoder is set: --vae)" in capsys.readouterr().out
    assert "--format npz is for images, and these are latents; give --vae" in refused(
        capsys, "sample", config.run_dir, "--format", "npz"
    )
    assert refused(capsys, "eval", config.run_dir, "--count", "5") == (
        "soflow: no score is possible: no autoencoder is set (data.vae), so samples stay latents; give --vae NAME, or "
        "draw without a score by soflow sample\n"
    )
    assert not (tmp_path / "run" / "evaluation").exists()


@pytest.mark.parametrize("options", [[], ["--features", "pixels"]])
def test_eval_says_that_the_reference_is_missing(tmp_path, capsys, options):
    data = DataConfig(kind="runs.Blobs", workers=0)
    Trainer(tiny_config(tmp_path / "run", data=data, total_steps=1)).fit()
    capsys.readouterr()
    assert refused(capsys, "eval", tmp_path / "run", *options) == (
        "soflow: no score is possible: evaluation.reference is not set to a folder of real images or a .npz file of "
        "their statistics; give --reference PATH, or draw without a score by soflow sample\n"
    )


def test_a_run_that_does_not_stay_finite_ends_with_code_1(tmp_path, capsys):
    config = tiny_config(tmp_path / "run")
    path = write_config(
        tmp_path / "config.yaml", replace(config, optimizer=replace(config.optimizer, learning_rate=1e30))
    )
    assert main(["train", str(path)]) == 1
    assert "was not finite at step" in capsys.readouterr().err.splitlines()[-1]
