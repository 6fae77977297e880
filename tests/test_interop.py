"""The published SoFlow YAML files, as they are."""

import re

import pytest
from torch import nn

from soflow_fast import TrainConfig, interop
from soflow_fast.build import build_model
from soflow_fast.config_io import leaves

IMAGENET = """
working_dir: './runs/imagenet' # comment
noising_type: 'Linear' # Linear or Triangular
coefficient_type: 'Euler'
model_type: 'DiT-XL-2'
dataset_type: 'Imagenet'
data_size: 32
dataset_path: './imagenet_latent'
velocity_loss_ratio: 0.75
p: 1.0
eps: 0.01
time_mean: [-0.2, -1.0, 0.2]
time_std: [1.0, 0.8, 0.8]
cfg_scale: 2.5
mix_ratio: 0.25
cfg_drop_rate: 0.1
cfg_decay_time: 0.8
l_schedule: 'Exponent'
l_init_ratio: 0.1
l_end_ratio: 0.002
total_steps: 1200000
ema_decay_rate: 0.9999
learning_rate: 1e-4
betas: [0.9, 0.99]
weight_decay: 0.0
batch_size: 256
num_workers: 12
prefetch_factor: 6
eval_steps: 50000
eval_batch_size: 125
eval_NFE: 2
eval_demo_steps: 1000
eval_demo_shape: [4, 8]
ckpt_saving_steps: 200000
logging_steps: 100
seed: 42
"""


def _read(tmp_path, text):
    path = tmp_path / "imagenet.yaml"
    path.write_text(text)
    return TrainConfig.from_yaml(path)


def test_imagenet_file_as_it_is(tmp_path):
    config = _read(tmp_path, IMAGENET)
    assert (config.run_dir, config.batch_size, config.total_steps, config.seed) == (
        "./runs/imagenet",
        256,
        1_200_000,
        42,
    )
    assert (config.model.preset, config.model.input_size, config.model.in_channels) == ("DiT-XL/2", 32, 4)
    assert config.model.num_classes == 1000
    assert (config.data.kind, config.data.path, config.data.workers, config.data.prefetch) == (
        "latents",
        "./imagenet_latent",
        12,
        6,
    )
    assert (config.soflow.path, config.soflow.parameterization) == ("linear", "euler")
    assert (config.soflow.guidance_scale, config.soflow.guidance_mix, config.soflow.guidance_decay_time) == (
        2.5,
        0.25,
        0.8,
    )
    assert (config.soflow.label_drop, config.soflow.velocity_share) == (0.1, 0.75)
    assert (config.soflow.time_mean, config.soflow.time_std) == ((-0.2, -1.0, 0.2), (1.0, 0.8, 0.8))
    assert (config.soflow.gap_schedule, config.soflow.gap_init, config.soflow.gap_end) == ("exponential", 0.1, 0.002)
    assert (config.optimizer.learning_rate, config.optimizer.betas, config.ema.decay) == (1e-4, (0.9, 0.99), 0.9999)
    output = config.output
    assert (output.log_every, output.checkpoint_every, output.sample_every, output.sample_shape) == (
        100,
        200_000,
        1000,
        (4, 8),
    )
    assert (config.evaluation.every, config.evaluation.batch_size, config.evaluation.steps) == (50_000, 125, 2)


# The recipe for CIFAR-10 (arXiv 2512.15657).
CIFAR10 = """
model_type: UNet
dataset_type: CIFAR10
velocity_loss_ratio: 0.0
p: 0.75
eps: 0.001
time_mean: [-0.9, -4.0, -0.9]
time_std: [1.6, 1.6, 1.6]
l_init_ratio: 1.0
l_end_ratio: 0.0003125
total_steps: 800000
batch_size: 1024
"""


def test_the_cifar10_recipe(tmp_path):
    config = _read(tmp_path, CIFAR10)
    assert (config.model.preset, config.model.in_channels, config.model.num_classes) == ("UNet", 3, 0)
    assert (config.data.kind, config.data.path, config.data.augment) == ("cifar10", "./cifar10", 0.12)
    assert config.optimizer.name == "radam"
    objective = build_model(config)
    assert (objective.velocity_share, objective.p, objective.eps, objective.guidance_scale) == (0, 0.75, 0.001, 1)
    assert (objective.time_mean, objective.time_std) == ((-0.9, -4.0, -0.9), (1.6, 1.6, 1.6))
    assert (objective.gap_init, objective.gap_end) == (1, 0.0003125)
    assert (objective.network.augment_dim, objective.network.map_label) == (9, None)
    assert {m.p for m in objective.modules() if isinstance(m, nn.Dropout)} == {0.13}


def test_network_and_data_are_chosen_apart(tmp_path):
    config = _read(tmp_path, CIFAR10.replace("UNet", "DiT-B-4") + "dataset_path: here\n")
    assert (config.model.preset, config.data.path, config.data.augment) == ("DiT-B/4", "here", 0)
    config = _read(tmp_path, IMAGENET.replace("DiT-XL-2", "UNet"))
    assert (config.model.preset, config.model.in_channels, config.data.augment) == ("UNet", 4, 0)
    assert (config.optimizer.name, config.data.kind) == ("adamw", "latents")


@pytest.mark.parametrize("word", ["Trig", "Triangular"])
def test_both_names_of_the_trigonometric_path(tmp_path, word):
    config = _read(tmp_path, IMAGENET.replace("'Linear'", word).replace("'Euler'", word))
    assert (config.soflow.path, config.soflow.parameterization) == ("trig", "trig")


@pytest.mark.parametrize(
    ("word", "ours"), [("Const", "const"), ("Linear", "linear"), ("Cosine", "cosine"), ("Exponent", "exponential")]
)
def test_schedules(tmp_path, word, ours):
    assert _read(tmp_path, IMAGENET.replace("'Exponent'", word)).soflow.gap_schedule == ours


def test_keys_left_out_have_the_published_trainers_values(tmp_path):
    config = _read(tmp_path, "model_type: DiT-B-4\n")
    assert (config.soflow.guidance_scale, config.soflow.label_drop, config.seed) == (1.0, 0.0, 42)


def test_every_published_key_has_one_meaning():
    names = [name for name, _ in interop.PUBLIC.values()]
    assert len(set(names)) == len(names)
    assert set(names) <= leaves(TrainConfig).keys()


def test_what_only_the_objective_finds_is_said_in_the_files_words():
    sentence = "guidance_scale=3 needs it, which label_drop=0 does not; set label_drop > 0"
    published = "cfg_scale=3 needs it, which cfg_drop_rate=0 does not; set cfg_drop_rate > 0"
    for raw, words in (({"working_dir": "x"}, published), ({"run_dir": "x"}, sentence)):
        with pytest.raises(ValueError, match=f"^{words}$"), interop.public_words(raw):
            raise ValueError(sentence)


def test_a_published_file_is_overridden_by_nested_names():
    config = TrainConfig.from_dict({"working_dir": "x"}, ["--data.vae", "y"])
    assert (config.run_dir, config.data.vae) == ("x", "y")
    with pytest.raises(ValueError, match=r"unknown key 'cfg_scale'; the nearest is 'soflow\.guidance_scale'"):
        TrainConfig.from_dict({"working_dir": "x"}, ["--cfg_scale", "3"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (IMAGENET.replace("'Imagenet'", "CIFAR100"), ["dataset_type", "CIFAR100", "choose one of Imagenet, CIFAR10"]),
        (IMAGENET.replace("DiT-XL-2", "DiT-Z-2"), ["model_type", "DiT-Z-2", "DiT-XL-2"]),
        (IMAGENET.replace("l_schedule", "l_shedule"), ["l_shedule", "l_schedule"]),
        (IMAGENET.replace("'Exponent'", "Sqrt"), ["l_schedule", "Sqrt", "Cosine"]),
        (IMAGENET.replace("[4, 8]", "32"), ["eval_demo_shape", "32"]),
        (IMAGENET.replace("1e-4", "-1"), ["learning_rate=-1.0 must be greater than 0"]),
        (IMAGENET.replace("p: 1.0", "p: -1"), ["p=-1.0 must not be negative"]),
        (IMAGENET.replace("0.8, 0.8", ".nan, 0.8"), ["time_std=(1.0, nan, 0.8) does not fit"]),
        (IMAGENET.replace("num_workers: 12", "num_workers: -1"), ["num_workers=-1 is not possible"]),
        (IMAGENET + "data: {vae: x}\n", ["'data' of the nested form", "cannot be mixed", "--data.vae NAME"]),
        (IMAGENET + "device: cpu\n", ["'device' of the nested form", "cannot be mixed"]),
        (IMAGENET + "data.vae: x\n", ["'data.vae' of the nested form", "cannot be mixed"]),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, text, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        _read(tmp_path, text)
    for word in words:
        assert word in str(error.value)
