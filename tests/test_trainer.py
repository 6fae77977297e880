"""The training run: resuming, also after a kill, is exact; what it writes; what it refuses."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import (
    Blobs,
    StopError,
    assert_bitwise_equal,
    files,
    final,
    stop_at,
    tiny_config,
    write_config,
    write_latents,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from soflow_fast import DiT, Trainer, checkpoint, grids, logs, scoring, trainer
from soflow_fast.config import (
    ComputeConfig,
    DataConfig,
    EMAConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    SoFlowConfig,
)
from soflow_fast.data.order import batch_indices

# ------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("data", [{"workers": 2}, {"on_device": True}], ids=str)
def test_a_stopped_run_goes_on_exactly(tmp_path, monkeypatch, data):
    straight = tiny_config(tmp_path / "straight", data=DataConfig(kind="digits", workers=0))
    Trainer(straight).fit()
    stopped = replace(straight, run_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(StopError):
            Trainer(stopped).fit()
    # what has no influence on the weights may change, and the metrics beyond the checkpoint are written again
    (tmp_path / "stopped" / "metrics.jsonl").open("a").write('{"step": 5, "loss"')
    data = DataConfig(kind="digits", **data)
    Trainer(replace(stopped, output=replace(stopped.output, log_every=1), data=data)).fit()
    assert_bitwise_equal(final(tmp_path / "straight"), final(tmp_path / "stopped"))
    lines = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [2, 4, 5, 6]


def test_a_finished_run_stays_as_it_is(tmp_path):
    config = tiny_config(tmp_path)
    path = Trainer(config).fit()
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert Trainer(config).fit() == path
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before


# A process that kills itself, without any clean-up, before its n-th call of a function that changes the disk.
_SUICIDE = """
import os, signal, sys
left = int(sys.argv[1])
def dying(original):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call
for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
    setattr(os, name, dying(getattr(os, name)))
from soflow_fast.cli import main
sys.exit(main(sys.argv[2:]))
"""


def test_a_run_killed_again_and_again_ends_bitwise_as_if_it_never_was(tmp_path):
    output = OutputConfig(log_every=2, sample_every=0, checkpoint_every=1, keep_checkpoints=1)
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=3, schedule="cosine")
    ema = EMAConfig(posthoc=(0.05, 0.1), snapshot_every=2)
    straight = tiny_config(tmp_path / "straight", total_steps=8, output=output, ema=ema, optimizer=optimizer)
    Trainer(straight).fit()
    config = replace(straight, run_dir=str(tmp_path / "killed"))
    command = ["train", str(write_config(tmp_path / "config.yaml", config))]
    # The configuration is the first call, writing a checkpoint about eight, removing the one before another eight, and
    # the snapshots of every second step are eight: the kills fall into the first checkpoint, into snapshots, a later
    # checkpoint and a removal, and the runs get further each time.
    kills = (4, 20, 30, 45)
    for calls in (*kills, 10**9):
        process = subprocess.run(
            [sys.executable, "-c", _SUICIDE, str(calls), *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if calls in kills:
            assert process.returncode == -signal.SIGKILL, process.stderr
    assert process.returncode == 0, process.stderr
    assert_bitwise_equal(final(tmp_path / "straight", 8), final(tmp_path / "killed", 8))
    assert files(tmp_path / "killed" / "ema") == files(tmp_path / "straight" / "ema")


# --------------------------------------------------------------------------------------------------- what is written


def test_public_keys_and_metrics(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, total_steps=2, output=OutputConfig(log_every=2, sample_every=0, checkpoint_every=1))
    run = Trainer(config)
    network = DiT(8, 4, 1, 16, 1, 2, num_classes=10)
    state_before = torch.get_rng_state()
    seen = []
    original = trainer.TrainStep.__call__
    monkeypatch.setattr(trainer.TrainStep, "__call__", lambda *args: seen.append(original(*args)) or seen[-1])
    run.fit()
    assert torch.equal(torch.get_rng_state(), state_before)
    for name in ("model", "ema"):
        weights = load_file(tmp_path / "checkpoints" / "step-00000002" / f"{name}.safetensors")
        assert weights.keys() == {f"network.{key}" for key in network.state_dict()}

    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["step"] == 2
    assert line["images_per_second"] > 0
    assert line["loss"] == pytest.approx(sum(float(stats.loss) for stats in seen) / 2, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(sum(float(stats.grad_norm) for stats in seen) / 2, rel=1e-5)
    for name in ("velocity", "consistency"):
        mse, weight, t = (
            np.concatenate([getattr(stats.parts[name], field).numpy() for stats in seen])
            for field in ("mse", "weight", "t")
        )
        assert line[f"{name}/mse"] == pytest.approx(mse.mean(), rel=1e-5)
        assert line[f"{name}/weighted"] == pytest.approx((mse * weight).mean(), rel=1e-5)
        for i, value in enumerate(line[f"{name}/mse_by_time"]):
            members = mse[(t >= i / 10) & (t < (i + 1) / 10)]
            assert value is None if len(members) == 0 else value == pytest.approx(members.mean(), rel=1e-5)

    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("velocity/mse")[0].value == pytest.approx(line["velocity/mse"])
    assert {"loss", "grad_norm", "images_per_second"} <= set(events.Tags()["scalars"])


def test_what_the_device_has_yet_to_do_counts_for_the_rate(tmp_path, monkeypatch):
    """Steps are queued on a GPU; a report waits for them, and what it waits must be on the clock."""
    events = []
    original = trainer.Meter.skipped
    monkeypatch.setattr(trainer.Meter, "skipped", lambda meter: events.append("waited") or original(meter))
    monkeypatch.setattr(logs.RunLog, "off_the_clock", lambda log: events.append("off") or nullcontext())
    Trainer(tiny_config(tmp_path, output=OutputConfig(log_every=9, sample_every=2, checkpoint_every=0))).fit()
    during = events[events.index("waited") :]
    assert during == ["waited", "off"] * 2 + ["waited", "waited", "off"]  # grids of steps 2 and 4; the last one


def test_samples_and_scores_during_training(tmp_path):
    config = tiny_config(
        tmp_path,
        output=OutputConfig(log_every=3, sample_every=3, sample_shape=(2, 5), checkpoint_every=0),
        evaluation=EvaluationConfig(every=3, samples=20, batch_size=8),
    )
    Trainer(config).fit()
    assert sorted(file.name for file in (tmp_path / "samples").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "evaluation/frechet_all" in line]
    assert [line["step"] for line in scored] == [3, 6]
    assert len(checkpoint.committed(tmp_path / "checkpoints")) == 1  # the last step always has one


def test_the_classes_of_the_grid_and_the_checkpoints_that_stay_can_be_chosen(tmp_path, monkeypatch):
    output = OutputConfig(sample_every=6, sample_shape=(2, 5), checkpoint_every=1, keep_checkpoints=1, keep_every=3)
    config = tiny_config(tmp_path, output=replace(output, sample_labels=(3, 7)))
    drawn, draw = [], grids.Sampler.draw
    monkeypatch.setattr(
        grids.Sampler, "draw", lambda self, labels, *rest: drawn.append(labels) or draw(self, labels, *rest)
    )
    Trainer(config).fit()
    assert [labels.tolist() for labels in drawn] == [[3, 7] * 5]
    assert [checkpoint.step_of(path) for path in checkpoint.committed(tmp_path / "checkpoints")] == [3, 6]
    with pytest.raises(ValueError, match=r"output\.sample_labels=\[3, 10\] has the class 10, and there are 0\.\.9"):
        Trainer(replace(config, output=replace(output, sample_labels=(3, 10))))
    with pytest.raises(ValueError, match=r"keep_every=3 is no multiple of output\.checkpoint_every=2; .* a multiple"):
        OutputConfig(checkpoint_every=2, keep_every=3)


def test_every_line_of_the_metrics_goes_to_the_hook(tmp_path):
    config, lines = tiny_config(tmp_path, evaluation=EvaluationConfig(every=3, samples=20, batch_size=8)), []
    Trainer(config, on_log=lines.append).fit()
    assert lines == [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]


def test_a_grid_goes_to_the_hook_and_to_tensorboard(tmp_path):
    config, lines = tiny_config(tmp_path, output=OutputConfig(log_every=6, sample_every=6, sample_shape=(2, 5))), []
    Trainer(config, on_log=lines.append).fit()
    path = tmp_path / "samples" / "step-00000006.png"
    assert [line for line in lines if "samples" in line] == [{"step": 6, "samples": str(path)}]
    events = EventAccumulator(str(tmp_path)).Reload()
    (shown,) = events.Images("samples")
    assert shown.step == 6
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)))[..., 0], Image.open(path))


def test_an_error_of_the_hook_costs_its_line_and_not_the_run(tmp_path, caplog):
    Trainer(tiny_config(tmp_path), on_log=lambda line: 1 / 0).fit()
    assert "on_log failed at step 4, and training goes on: division by zero" in caplog.text
    assert final(tmp_path).step == 6


def test_a_failing_evaluation_costs_its_score_and_not_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(scoring, "evaluate", lambda *_, **__: 1 / 0)
    Trainer(tiny_config(tmp_path, evaluation=EvaluationConfig(every=4))).fit()
    assert "the evaluation at step 4 failed, and training goes on: division by zero" in caplog.text
    assert final(tmp_path).step == 6
    assert "evaluation/" not in (tmp_path / "metrics.jsonl").read_text()


def test_what_cannot_be_scored_is_not_drawn_during_training(tmp_path, capsys):
    data = DataConfig(kind="latents", path=str(write_latents(tmp_path / "latents.hdf5")), workers=0)
    config = tiny_config(tmp_path, data=data, evaluation=EvaluationConfig(every=2))
    Trainer(replace(config, model=replace(config.model, in_channels=4))).fit()
    assert capsys.readouterr().err.count("no evaluation during training: no autoencoder is set (data.vae)") == 1
    assert not (tmp_path / "evaluation").exists()


def test_samples_use_the_averages_and_leave_the_weights_alone(tmp_path):
    run = Trainer(tiny_config(tmp_path))
    run.fit()
    weight = run.model.network.final_layer.linear.weight
    own, address = weight.detach().clone(), weight.data_ptr()
    with run.ema.applied():
        assert not torch.equal(weight, own)
        assert torch.equal(weight, run.ema.averages["network.final_layer.linear.weight"])
    assert torch.equal(weight, own)
    assert weight.data_ptr() == address


def test_load_run_gives_the_averages(tmp_path):
    config = tiny_config(tmp_path)
    run = Trainer(config)
    run.fit()
    loaded, model, step = trainer.load_run(tmp_path, "cpu")
    assert (loaded, step) == (run.config, 6)
    assert run.config == replace(config, compute=ComputeConfig(precision="fp32"))
    assert all(torch.equal(value, run.ema.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("attention", ["triton", "cudnn"])
def test_a_run_trained_on_a_gpu_is_loaded_without_one(tmp_path, attention):
    Trainer(tiny_config(tmp_path)).fit()
    file = tmp_path / "config.yaml"
    text = file.read_text()
    assert "attention: auto" in text
    file.write_text(text.replace("attention: auto", f"attention: {attention}"))
    loaded, model, _ = trainer.load_run(tmp_path, "cpu")
    assert loaded.model.attention == attention
    assert model.network.attention == "sdpa"


# -------------------------------------------------------------------------------------------- other objectives


def test_unconditional_training(tmp_path):
    config = tiny_config(
        tmp_path,
        model=replace(tiny_config(tmp_path).model, num_classes=0),
        soflow=SoFlowConfig(guidance_scale=1.0, label_drop=0.0),
    )
    Trainer(config, dataset=Blobs()).fit()
    assert final(tmp_path).step == 6


@pytest.mark.parametrize("objective", ["meanflow", "improved_meanflow", "alphaflow", "scm", "flow_matching"])
def test_other_objectives_train_and_sample(tmp_path, objective):
    config = tiny_config(tmp_path, objective=objective)
    config = replace(config, total_steps=2, output=replace(config.output, sample_every=2))
    Trainer(config).fit()
    assert (tmp_path / "samples" / "step-00000002.png").is_file()


# ------------------------------------------------------------------------------------------------ not finite


_POISONED = (3, 17, 40)


class _Poisoned(Blobs):
    def __getitem__(self, index):
        sample, label = super().__getitem__(index)
        return (sample / 0 if index in _POISONED else sample), label


def _poisoned_steps(steps):
    """The steps, from 0, in batches of 4 of 64 samples, that have a poisoned one."""
    return [step for step in range(steps) if set(_POISONED) & set(batch_indices(64, 4, step, seed=0))]


def test_a_step_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(tmp_path):
    first = _poisoned_steps(16)[0] + 1
    with pytest.raises(FloatingPointError, match=rf"not finite at step {first} ") as error:
        Trainer(tiny_config(tmp_path, batch_size=4, total_steps=16), dataset=_Poisoned()).fit()
    (culprit,) = re.findall(r"item (\d+) of the data, which it read, is not finite either; mend it", str(error.value))
    assert int(culprit) in set(_POISONED) & set(batch_indices(64, 4, first - 1, seed=0))
    kept = checkpoint.committed(tmp_path / "checkpoints")
    assert (str(kept[-1]) if kept else "the start") in str(error.value)
    assert [checkpoint.load(path).step for path in kept] == list(range(2, first, 2))[-3:]


def test_steps_that_are_not_finite_are_left_out_up_to_the_limit(tmp_path):
    config = tiny_config(tmp_path, batch_size=4, total_steps=16, max_skipped_steps=3)
    Trainer(config, dataset=_Poisoned()).fit()
    state, taken = final(tmp_path, 16), 16 - len(_poisoned_steps(16))
    assert taken < 16
    assert (state.skipped_steps, state.ema_updates) == (16 - taken, taken)
    assert {float(s["step"]) for s in state.optimizer["state"].values()} == {taken}
    assert all(value.isfinite().all() for value in (*state.model.values(), *state.ema.values()))


# --------------------------------------------------------------------------------------------------- refusals


def test_a_run_of_another_config_or_model_is_refused_and_nothing_is_lost(tmp_path):
    config = tiny_config(tmp_path)
    Trainer(config).fit()
    before = files(tmp_path)
    with pytest.raises(ValueError, match="holds a run with seed=0, and this one has 1"):
        Trainer(replace(config, seed=1)).fit()
    wider = ModelConfig(input_size=8, in_channels=1, num_classes=10, patch_size=4, hidden_size=32, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"model\.hidden_size=16, and this one has 32"):
        Trainer(replace(config, model=wider)).fit()
    assert files(tmp_path) == before
    record = tmp_path / "config.yaml"
    record.write_text(record.read_text().replace("hidden_size: 16", "hidden_size: 32"))
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"of another model: network\."):
        Trainer(replace(config, model=wider)).fit()
    assert files(tmp_path) == before
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"holds a run without its config\.yaml"):
        Trainer(config).fit()


def test_a_run_that_never_got_anywhere_can_be_started_differently(tmp_path):
    config = tiny_config(tmp_path, model=replace(tiny_config(tmp_path).model, num_classes=5))
    with pytest.raises(ValueError, match=r"outside the classes 0\.\.4"):
        Trainer(config).fit()
    Trainer(tiny_config(tmp_path)).fit()
    assert final(tmp_path).step == 6


def test_other_refusals(tmp_path):
    config = tiny_config(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; choose a folder"):
        Trainer(replace(config, run_dir=str(tmp_path / "file"))).fit()
    with pytest.raises(ValueError, match="batch_size=2000 is more than the 1347 samples"):
        Trainer(replace(config, batch_size=2000))
    with pytest.raises(ValueError, match=r"choose a batch per process and micro-batch that is a multiple of 4"):
        Trainer(replace(config, batch_size=12, optimizer=OptimizerConfig(accumulation=2))).fit()
    with pytest.raises(ValueError, match=r"evaluation\.reference='nowhere' does nothing here"):
        Trainer(replace(config, evaluation=EvaluationConfig(every=1, reference="nowhere")))
    with pytest.raises(ValueError, match="is not a run: it holds no"):
        trainer.load_run(tmp_path)
    assert not (tmp_path / "run" / "checkpoints").exists()
