"""Configuration: the published defaults, reading, overriding, and one clear sentence for every mistake."""

import copy
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from runs import tiny_config

from soflow_fast import TrainConfig, Trainer
from soflow_fast.config import DataConfig, EMAConfig, OptimizerConfig, SoFlowConfig


def test_defaults_are_the_published_imagenet_recipe():
    config = TrainConfig()
    assert (config.model.preset, config.model.input_size, config.model.in_channels) == ("DiT-B/4", 32, 4)
    assert (config.batch_size, config.model.num_classes, config.data.latent_scale) == (256, 1000, 0.18215)
    assert (config.optimizer.learning_rate, config.optimizer.betas, config.optimizer.weight_decay) == (
        1e-4,
        (0.9, 0.99),
        0,
    )
    soflow = config.soflow
    assert (soflow.guidance_scale, soflow.guidance_mix, soflow.label_drop, soflow.guidance_decay_time) == (
        3,
        0.25,
        0.1,
        0.8,
    )
    assert (soflow.p, soflow.eps, soflow.velocity_share, config.ema.decay) == (1, 0.01, 0.75, 0.9999)
    assert (soflow.time_mean, soflow.time_std) == ((-0.2, -1.0, 0.2), (1.0, 0.8, 0.8))
    assert (soflow.gap_schedule, soflow.gap_init, soflow.gap_end, soflow.min_gap) == ("exponential", 0.1, 0.002, 1e-4)


def test_only_files_and_command_lines_need_a_parser():
    code = (
        "import sys; sys.modules['jsonargparse'] = None  # as if it were not installed\n"
        "import soflow_fast, soflow_fast.kernels, campaign, kernels, rates, throughput, precision, sampling, errors\n"
        "print(soflow_fast.TrainConfig(batch_size=8).batch_size)"
    )
    scripts = Path(__file__).parents[1] / "benchmarks"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=scripts)
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr


def test_yaml_and_overrides(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("batch_size: 32\noptimizer:\n  learning_rate: 3e-4\n  betas: [0.9, 0.95]\nmodel:\n  depth: 3\n")
    config = TrainConfig.from_yaml(
        path,
        ["--batch_size", "64", "--ema.warmup=false", "--optimizer.betas", "[0.5, 0.6]", "--ema.posthoc=[0.05, 0.1]"],
    )
    assert config.ema.posthoc == (0.05, 0.1)
    assert (config.batch_size, config.ema.warmup) == (64, False)
    assert (config.optimizer.learning_rate, config.optimizer.betas) == (3e-4, (0.5, 0.6))
    assert (config.model.depth, config.model.preset) == (3, "DiT-B/4")


def test_compute_and_data_choose_by_themselves_unless_told():
    config = TrainConfig.from_dict({}, ["--compute.compile", "max-autotune", "--data.on_device=true"])
    assert (config.compute.precision, config.compute.compile, config.compute.cuda_graph) == (
        "auto",
        "max-autotune",
        "auto",
    )
    assert (config.data.on_device, config.data.latent_precision, config.model.recompute) == (True, "fp32", "auto")
    with pytest.raises(ValueError, match=r"data\.on_device='often' does not fit; it must be: true or false or auto"):
        DataConfig(on_device="often")


def test_written_config_reads_back_equal(tmp_path):
    config = tiny_config(tmp_path, seed=7, ema=EMAConfig(posthoc=(0.05, 0.1)))
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert TrainConfig.from_yaml(path) == config


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("total_steps: 4e5\nbatch_size: 256.0\noptimizer: {warmup_steps: 1E+3}\nmodel: {depth: 2.0e+0}\n")
    config = TrainConfig.from_yaml(path)
    assert (config.total_steps, config.batch_size, config.model.depth) == (400_000, 256, 2)
    assert type(config.total_steps) is type(config.optimizer.warmup_steps) is int
    given = ["--total_steps", "8e5", "--ema.snapshot_every=5e4", "--seed", "9007199254740993", "--model.preset", "1e3"]
    config = TrainConfig.from_yaml(path, given)
    assert (config.total_steps, config.ema.snapshot_every, config.seed) == (800_000, 50_000, 9007199254740993)
    assert config.model.preset == "1e3"
    with pytest.raises(ValueError, match=r"total_steps=0\.00015 does not fit; it must be: a whole number"):
        TrainConfig.from_dict({}, ["--total_steps", "15e-5"])


def test_a_name_that_there_is_not_cannot_be_set():
    config = TrainConfig()
    with pytest.raises(AttributeError, match="TrainConfig has no 'totl_steps'; the nearest is 'total_steps'"):
        config.totl_steps = 3
    with pytest.raises(AttributeError, match="OptimizerConfig has no 'grad_clipping'; the nearest is 'grad_clip'"):
        config.optimizer.grad_clipping = 1.0
    with pytest.raises(
        AttributeError, match="EMAConfig has no 'zzz'; there are decay, warmup, posthoc, snapshot_every"
    ):
        config.ema.zzz = 1
    config.total_steps = 3
    assert copy.deepcopy(config) == config


@pytest.mark.parametrize(
    ("section", "name", "value", "sentence"),
    [
        (None, "total_steps", 0, "total_steps=0 is not possible; it must be at least 1"),
        (None, "total_steps", 10**22, "it must be at most 2147483647"),
        (None, "run_dir", "", "run_dir is empty; name the folder of the run"),
        ("model", "depth", 10**9, "model.depth=1000000000 is not possible; it must be at most 16384"),
        (None, "optimizer", {}, "optimizer is a dict and must be a OptimizerConfig"),
        ("optimizer", "grad_clip", -1.0, r"optimizer\.grad_clip=-1\.0 must be greater than 0"),
        ("optimizer", "accumulation", 3, "optimizer.accumulation=3 does not divide batch_size=16"),
        ("soflow", "p", "1", "soflow.p='1' does not fit; it must be: a finite number"),
    ],
)
def test_a_value_set_later_is_checked_where_it_is_used(tmp_path, section, name, value, sentence):
    config = tiny_config(tmp_path)
    setattr(config if section is None else getattr(config, section), name, value)
    with pytest.raises(ValueError, match=sentence):
        Trainer(config)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"optimizer": OptimizerConfig(warmup_steps=7)},
            r"optimizer\.warmup_steps=7 is more than total_steps=6, and optimizer\.learning_rate=0\.0001 is never",
        ),
        (
            {"ema": EMAConfig(posthoc=(0.05, 0.1), snapshot_every=7)},
            r"ema\.snapshot_every=7 leaves ema\.posthoc=\[0\.05, 0\.1\] one snapshot in total_steps=6, .* such as 1",
        ),
    ],
)
def test_what_cannot_act_in_so_few_steps_is_refused_and_a_record_of_it_is_read(tmp_path, changes, sentence):
    config = tiny_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=sentence):
        Trainer(config)
    assert TrainConfig.from_dict(config.to_dict()) == config
    Trainer(replace(config, total_steps=7))


@pytest.mark.parametrize(
    ("raw", "overrides", "words"),
    [
        ({"lerning_rate": 1}, [], ["lerning_rate", "optimizer.learning_rate"]),
        ({"optimizer": {"learning_rat": 1}}, [], ["optimizer.learning_rat", "'optimizer.learning_rate'"]),
        ({"modle": {"depth": 1}}, [], ["modle.depth", "model.depth"]),
        ({"optimizer": {"warmup": 1}}, [], ["the nearest is 'optimizer.warmup_steps'"]),
        ({"optimizer": {"lr": 1}}, [], ["the nearest is 'optimizer.learning_rate'"]),
        ({"optimizer": {"dropout": 1}}, [], ["the nearest is 'model.dropout'"]),
        ({"warmup": 1}, [], ["the nearest is 'ema.warmup'"]),
        ({}, ["--zzz", "3"], ["unknown key 'zzz'; soflow train FILE --dry-run shows all that there are"]),
        ({}, ["--bach_size", "3"], ["bach_size", "'batch_size'"]),
        ({}, ["stray"], ["stray"]),
        ({"model": 3}, [], ["model=3", "indented"]),
        ({"batch_size": 0}, [], ["batch_size=0", "at least 1"]),
        ({"batch_size": "many"}, [], ["batch_size=many", "a whole number"]),
        ({"batch_size": None}, [], ["batch_size", "no value"]),
        ({"total_steps": 1.5}, [], ["total_steps=1.5", "a whole number"]),
        ({"seed": -1}, [], ["seed=-1", "2^63"]),
        ({"objective": "soflw"}, [], ["objective='soflw'", "soflow"]),
        ({"optimizer": {"learning_rate": -1e-4}}, [], ["optimizer.learning_rate=-0.0001", "greater than 0"]),
        ({}, ["--optimizer.learning_rate", "-1"], ["optimizer.learning_rate=-1.0", "greater than 0"]),
        ({"optimizer": {"learning_rate": float("nan")}}, [], ["optimizer.learning_rate=nan"]),
        ({"optimizer": {"betas": [0.9]}}, [], ["optimizer.betas=[0.9]", "[a finite number, a finite number]"]),
        ({"optimizer": {"betas": [0.9, 1.0]}}, [], ["optimizer.betas=(0.9, 1.0)", "[0, 1)"]),
        ({"optimizer": {"weight_decay": -1}}, [], ["optimizer.weight_decay=-1", "negative"]),
        ({"optimizer": {"name": "adam"}}, [], ["optimizer.name='adam' is not known", "adamw, radam, given"]),
        ({"optimizer": {"grad_clip": 0}}, [], ["optimizer.grad_clip=0", "null"]),
        ({"optimizer": {"accumulation": 3}}, [], ["optimizer.accumulation=3", "batch_size=256"]),
        ({"ema": {"decay": 1.0}}, [], ["ema.decay=1.0", "[0, 1)"]),
        ({"ema": {"posthoc": [0.05]}}, [], ["ema.posthoc=[0.05]", "two or more different values"]),
        ({}, ["--ema.posthoc", "[0.1, 0.1]"], ["ema.posthoc=[0.1, 0.1]", "two or more different values"]),
        ({"ema": {"posthoc": [0.05, 0.3]}}, [], ["ema.posthoc=[0.05, 0.3]", "(0, 0.2886)"]),
        ({"ema": {"posthoc": 0.05}}, [], ["ema.posthoc=0.05", "[a finite number, ...]"]),
        ({"ema": {"snapshot_every": 0}}, [], ["ema.snapshot_every=0", "at least 1"]),
        ({"data": {"kind": "latens"}}, [], ["data.kind='latens'", "latents"]),
        ({"data": {"workers": -1}}, [], ["data.workers=-1", "at least 0"]),
        ({"data": {"on_device": "maybe"}}, [], ["data.on_device=maybe", "true or false or auto"]),
        ({"data": {"latent_precision": "fp16"}}, [], ["data.latent_precision=fp16", "bf16 or fp32"]),
        ({"compute": {"compile": "fast"}}, [], ["compute.compile=fast", "true or false or auto or max-autotune"]),
        ({"compute": {"precision": "fp8"}}, [], ["compute.precision=fp8", "auto or bf16 or tf32 or fp32"]),
        ({"model": {"depth": "deep"}}, [], ["model.depth=deep", "a whole number or null"]),
        ({"model": {"depth": 0}}, [], ["model.depth=0", "at least 1"]),
        (
            {"soflow": {"time_mean": [0, 0]}},
            [],
            ["soflow.time_mean", "[a finite number, a finite number, a finite number]"],
        ),
        ({"soflow": {"p": float("nan")}}, [], ["soflow.p=nan", "a finite number"]),
        ({"soflow": {"p": float("inf")}}, [], ["soflow.p=inf", "a finite number"]),
        ({"soflow": {"p": -1}}, [], ["soflow.p=-1", "must not be negative"]),
        ({"meanflow": {"p": -1}}, [], ["meanflow.p=-1", "must not be negative"]),
        ({"soflow": {"time_std": [1, float("nan"), 1]}}, [], ["soflow.time_std=(1.0, nan, 1.0)", "a finite number"]),
        ({}, ["--lr", "3"], ["unknown key 'lr'", "'optimizer.learning_rate'"]),
        ({}, ["--wd=3"], ["unknown key 'wd'", "'optimizer.weight_decay'"]),
        ({}, ["--cfg_scale", "3"], ["unknown key 'cfg_scale'", "'soflow.guidance_scale'"]),
        ({}, ["--num_workers", "3"], ["unknown key 'num_workers'", "'data.workers'"]),
        ({"output": {"log_every": 0}}, [], ["output.log_every=0"]),
    ],
)
def test_mistakes_are_one_sentence(raw, overrides, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        TrainConfig.from_dict(raw, overrides)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TrainConfig(batch_size="256"), "batch_size='256' does not fit; it must be: a whole number"),
        (lambda: TrainConfig(batch_size=True), "batch_size=True does not fit; it must be: a whole number"),
        (lambda: OptimizerConfig(learning_rate="1e-4"), "optimizer.learning_rate='1e-4' does not fit"),
        (lambda: OptimizerConfig(betas=0.9), "optimizer.betas=0.9 does not fit"),
        (lambda: SoFlowConfig(time_mean=(0, 0)), "soflow.time_mean=(0, 0) does not fit"),
    ],
)
def test_values_of_another_type_are_one_sentence_in_python_too(make, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["does not exist"]),
        ("", ["is empty"]),
        ("- 1\n- 2\n", ["list", "key: value"]),
        ("model: [1, 2\n", ["not valid YAML", "line"]),
        ("model:\n  depth: 1\n depth: 2\n", ["not valid YAML", "line"]),
    ],
)
def test_unreadable_files_are_one_sentence(tmp_path, text, words):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        TrainConfig.from_yaml(path)
    for word in ["config.yaml", *words]:
        assert word in str(error.value)


def test_only_what_changes_the_weights_makes_another_run(tmp_path):
    config = tiny_config(tmp_path)
    same = config.to_dict()
    same["run_dir"], same["device"], same["output"]["log_every"] = "elsewhere", "auto", 99
    same["data"]["workers"], same["data"]["on_device"], same["model"]["recompute"] = 7, True, "block"
    same["ema"]["snapshot_every"], same["data"]["path"] = 3, "moved"
    assert config.differences(TrainConfig.from_dict(same)) == []
    for name, change in (
        ("seed", {"seed": 1}),
        ("ema.posthoc", {"ema": {"posthoc": [0.05, 0.1]}}),
        ("model.depth", {"model": {**config.to_dict()["model"], "depth": 2}}),
        ("soflow.gap_end", {"soflow": {**config.to_dict()["soflow"], "gap_end": 0.01}}),
    ):
        assert config.differences(TrainConfig.from_dict({**config.to_dict(), **change})) == [name]


@pytest.mark.parametrize(
    ("raw", "overrides", "ignored"),
    [
        ({"soflow": {"guidance_scale": 2.0}}, ["--objective", "meanflow"], ["soflow"]),
        ({"objective": "meanflow", "meanflow": {"p": 0.5}}, ["--alphaflow.p=0.5"], ["alphaflow"]),
        ({"objective": "scm", "scm": {"eps": 0.1}}, ["--alphaflow.p=0.5"], ["alphaflow"]),
        ({"objective": "alphaflow"}, ["--meanflow.p", "1", "--soflow.p", "1"], ["soflow", "meanflow"]),
        ({"soflow": {"p": 0.5}, "meanflow": {}}, ["--soflow.eps", "0.1"], []),
    ],
)
def test_sections_of_another_objective_are_warned_of(caplog, raw, overrides, ignored):
    objective = TrainConfig.from_dict(raw, overrides).objective
    assert [record.getMessage() for record in caplog.records] == [
        f"the section {name} is ignored: the objective is {objective}" for name in ignored
    ]


def test_a_mapping_in_place_of_a_section_is_refused():
    sentence = r"model is a dict and must be a ModelConfig; nested mappings are for TrainConfig\.from_dict"
    with pytest.raises(ValueError, match=sentence):
        TrainConfig(model={"depth": 3})


def test_paths_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    raw = {
        "run_dir": "~/runs",
        "initial_weights": "~/x.pt",
        "data": {"path": "~/y"},
        "evaluation": {"reference": "~/z"},
    }
    config = TrainConfig.from_dict(raw)
    found = (config.run_dir, config.initial_weights, config.data.path, config.evaluation.reference)
    assert found == ("/home/me/runs", "/home/me/x.pt", "/home/me/y", "/home/me/z")
    assert TrainConfig(run_dir=Path("runs")).run_dir == "runs"
