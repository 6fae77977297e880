"""Averages of any length after the training: against the sums they stand for, on a disk that may die, in a run."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from runs import StopError, files, final, killed, stop_at, tiny_config
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from soflow_fast import Trainer, dry_run, posthoc
from soflow_fast.cli import main
from soflow_fast.config import EMAConfig
from soflow_fast.ema import PowerEMA, power_exponent
from soflow_fast.trainer import load_run

TRACKED = (0.05, 0.1)

# ------------------------------------------------------------------------------------------------ one average


@pytest.mark.parametrize("std", [0.001, 0.05, 0.1, 0.25, 0.2886])
def test_exponent_of_a_standard_deviation(std):
    exponent = power_exponent(std)
    assert exponent > 0
    assert (exponent + 1) ** 0.5 / (exponent + 2) / (exponent + 3) ** 0.5 == pytest.approx(std, rel=1e-9)


def test_the_published_pair():
    assert (round(power_exponent(0.05), 2), round(power_exponent(0.1), 2)) == (16.97, 6.94)


@pytest.mark.parametrize("std", [0.0, -0.1, 0.29, float("nan")])
def test_a_standard_deviation_outside_its_range(std):
    with pytest.raises(ValueError, match=rf"the relative standard deviation {std} of an average is outside \(0, 0\.28"):
        PowerEMA(nn.Linear(3, 2), std)


def _profile(std: float, updates: int) -> np.ndarray:
    """(updates,) the weight of each update's parameters."""
    return np.diff((np.arange(updates + 1) / updates) ** (power_exponent(std) + 1))


@pytest.mark.parametrize("left_out", [(), (0, 5)])
def test_an_average_is_its_weighted_sum(left_out):
    torch.manual_seed(0)
    module, taken = nn.Linear(3, 2), []
    ema = PowerEMA(module, 0.1)
    for step in range(30):
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 3))
        ema.update(torch.tensor(step not in left_out))
        if step not in left_out:
            taken.append(module.weight.detach().double())
    expected = sum(weight * value for weight, value in zip(_profile(0.1, len(taken)), taken, strict=True))
    assert int(ema.updates) == len(taken)
    torch.testing.assert_close(ema.averages["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_weight_of_one_update_among_many_is_not_rounded():
    ema = PowerEMA(nn.Linear(1, 1), 0.05)
    ema.updates.fill_(399_999)
    assert float(1 - ema.current_decay()) == pytest.approx(_profile(0.05, 400_000)[-1], rel=1e-9)


# ------------------------------------------------------------------------------------------------ reconstruction


class _Trajectory(nn.Module):
    """200 parameters on their way: a curve with noise that is correlated over a hundred updates."""

    def __init__(self, updates: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.end, self.start, self.drift = torch.randn(3, 200, generator=generator)
        self.rate = 1 + 7 * torch.rand(200, generator=generator)
        self.noise, self.updates, self.generator = torch.zeros(200), updates, generator
        self.weight = nn.Parameter(self.end + self.start)

    @torch.no_grad()
    def move(self, k: int) -> None:
        time = k / self.updates
        self.noise = 0.99 * self.noise + 0.02 * torch.randn(200, generator=self.generator)
        curve = self.start * torch.exp(-time * self.rate) + 0.3 * self.drift * time**0.5
        self.weight.copy_(self.end + curve + self.noise)


OTHERS = (0.06, 0.08, 0.12, 0.15)


def _tracked(folder, each: int, updates: int = 600, others=OTHERS) -> dict[float, torch.Tensor]:
    """The averages at the end of a trajectory, whose snapshots are written ``each`` times for both of TRACKED."""
    module = _Trajectory(updates)
    averages = [PowerEMA(module, std) for std in (*TRACKED, *others)]
    for k in range(1, updates + 1):
        module.move(k)
        for average in averages:
            average.update()
        if k % (updates // each) == 0:
            for average in averages[: len(TRACKED)]:
                posthoc.save(folder, k, average)
    return {average.std: average.averages["weight"] for average in averages}


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twenty")
    return folder, _tracked(folder, 20)


def _error(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


def _nearest(averages, std) -> float:
    """Relative distance to the nearest average tracked."""
    return min(_error(averages[one], averages[std]) for one in TRACKED)


@pytest.mark.parametrize("std", OTHERS)
def test_averages_that_were_not_tracked(twenty, std):
    folder, averages = twenty
    found = posthoc.reconstruct(folder, std)
    assert (found.step, found.snapshots) == (600, 40)
    assert found.residual < 6e-3
    assert _error(found.weights["weight"], averages[std]) < min(1e-4, 0.005 * _nearest(averages, std))


@pytest.mark.parametrize("step", [None, 300])
def test_averages_that_were_tracked_come_back(twenty, step):
    folder, _ = twenty
    found = posthoc.reconstruct(folder, 0.1, step)
    written = load_file(folder / "ema" / f"step-{step or 600:08d}" / "0.1.safetensors")
    assert found.step == (step or 600)
    assert _error(found.weights["weight"], written["weight"]) < 1e-6


@pytest.mark.parametrize("std", OTHERS)
def test_float16_would_cost_more_than_the_reconstruction(twenty, std):
    folder, averages = twenty
    used = posthoc.snapshots(folder)
    shares, _ = posthoc.fit([one.std for one in used], [one.updates for one in used], std, 600)
    stored = [load_file(one.path)["weight"] for one in used]
    rounded = sum(float(share) * (value.half().double() - value) for share, value in zip(shares, stored, strict=True))
    error = _error(posthoc.reconstruct(folder, std).weights["weight"], averages[std])
    assert rounded.norm() / averages[std].norm() > 2 * error


@pytest.mark.parametrize("std", [0.06, 0.08, 0.12])
def test_few_snapshots_need_weights_that_add_up_to_one(tmp_path, std):
    """Against the system without that condition, from four snapshots of each."""
    averages = _tracked(tmp_path, 4)
    used = posthoc.snapshots(tmp_path)
    stds, updates = [one.std for one in used], [one.updates for one in used]
    profiles = np.array([_on_grid(one, time / 600) for one, time in zip(stds, updates, strict=True)])
    alone = np.linalg.lstsq(profiles.T, _on_grid(std, 1.0), rcond=None)[0]
    assert 0.005 < abs(alone.sum() - 1) < 0.02
    assert posthoc.fit(stds, updates, std, 600)[0].sum() == pytest.approx(1, abs=1e-9)
    off = sum(float(a) * load_file(one.path)["weight"].double() for a, one in zip(alone, used, strict=True))
    error = _error(posthoc.reconstruct(tmp_path, std).weights["weight"], averages[std])
    assert error < 0.5 * _error(off, averages[std])
    assert error < _nearest(averages, std) / 4


def _on_grid(std: float, time: float, n: int = 20_000) -> np.ndarray:
    """(n,) the profile of an average at a time, at the middles of n equal parts of [0, 1]."""
    tau, exponent = (np.arange(n) + 0.5) / n, power_exponent(std)
    return np.where(tau <= time, (exponent + 1) * tau**exponent / time ** (exponent + 1), 0.0)


def test_the_fit_is_the_nearest_sum_and_knows_its_distance():
    stds, times = [0.05, 0.1, 0.05, 0.1, 0.2], [300, 300, 1000, 1000, 600]
    shares, residual = posthoc.fit(stds, times, 0.07, 1000)
    profiles = np.array([_on_grid(std, time / 1000) for std, time in zip(stds, times, strict=True)])
    wanted = _on_grid(0.07, 1.0)

    def distance(weights):
        return np.linalg.norm(weights @ profiles - wanted) / np.linalg.norm(wanted)

    assert residual == pytest.approx(distance(shares), rel=1e-3)
    for change in np.random.default_rng(0).standard_normal((20, 5)):
        assert distance(shares + 0.01 * (change - change.mean())) > residual


@pytest.mark.parametrize(
    ("each", "reached", "missed"), [(20, (0.025, 0.24), (0.02, 0.25)), (80, (0.01, 0.27), (0.28,))]
)
def test_how_far_snapshots_reach(each, reached, missed):
    times = [time for time in range(1, each + 1) for _ in TRACKED]
    for std in (*reached, *missed):
        residual = posthoc.fit(TRACKED * each, times, std, each)[1]
        assert (residual <= posthoc._WORST_RESIDUAL) == (std in reached)


def test_a_fit_that_is_just_good_enough_is_useful(tmp_path):
    averages = _tracked(tmp_path, 6, others=(0.04, 0.145))
    for std in (0.04, 0.145):
        found = posthoc.reconstruct(tmp_path, std)
        assert found.residual > 0.04
        assert _error(found.weights["weight"], averages[std]) < _nearest(averages, std) / 4


def test_snapshots_with_no_update_between_or_before_them(tmp_path):
    module = nn.Linear(2, 2)
    averages = [PowerEMA(module, std) for std in TRACKED]
    for step in range(12):
        for average in averages:
            average.update(step not in (0, 7))
            posthoc.save(tmp_path, step + 1, average)
    found = posthoc.reconstruct(tmp_path, 0.08)
    assert (found.step, found.snapshots) == (12, 22)
    torch.testing.assert_close(found.weights["weight"], module.weight.detach())  # it never moved


def test_what_cannot_be_reconstructed(twenty, tmp_path):
    folder, _ = twenty
    for std, off in ((0.02, r"8\.\d%"), (0.27, r"1\d\.\d%")):
        with pytest.raises(
            ValueError, match=rf"std {std} cannot be had from the 40 snapshots of .* off by {off}"
        ) as error:
            posthoc.reconstruct(folder, std)
        assert "choose a std nearer to 0.05 or 0.1, or train with a smaller ema.snapshot_every" in str(error.value)
    with pytest.raises(ValueError, match=r"has no snapshot of step 601; choose one of 30, 60, .*, 600$"):
        posthoc.reconstruct(folder, 0.08, step=601)
    with pytest.raises(ValueError, match=r"relative standard deviation 0\.3 of an average is outside"):
        posthoc.reconstruct(folder, 0.3)
    with pytest.raises(ValueError, match=r"has no snapshots .* started with ema\.posthoc, such as \[0\.05, 0\.1\]"):
        posthoc.reconstruct(tmp_path, 0.08)
    posthoc.save(tmp_path, 1, PowerEMA(nn.Linear(2, 2), 0.1))
    path = tmp_path / "ema" / "step-00000001" / "0.1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"the snapshot {path} is damaged"):
        posthoc.reconstruct(tmp_path, 0.08)


# --------------------------------------------------------------------------------------------------- on the disk


def test_a_kill_before_any_change_of_the_disk_leaves_a_whole_snapshot(tmp_path, monkeypatch):
    """A snapshot that is written again is the old one or the new one, and what a kill leaves is overwritten."""
    module, survivors = nn.Linear(2, 2), set()
    dangerous = [(os, "fsync"), (os, "replace"), (os, "mkdir"), (posthoc, "save_file")]
    for calls in range(100):
        folder, average = tmp_path / str(calls), PowerEMA(module, 0.1)
        average.update()
        posthoc.save(folder, 1, average)
        average.update()
        was_killed = killed(monkeypatch, calls, dangerous, partial(posthoc.save, folder, 1, average))
        (found,) = posthoc.snapshots(folder)
        assert load_file(found.path).keys() == {"weight", "bias"}
        survivors.add(found.updates)
        posthoc.save(folder, 1, average)
        assert [path.name for path in sorted((folder / "ema").iterdir())] == ["step-00000001"]
        if not was_killed:
            break
    assert calls > 4
    assert survivors == {1, 2}


def test_a_snapshot_on_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(posthoc, "save_file", full)
    sentence = rf"the snapshot of step 1 cannot be written to {tmp_path} .*make room, and the same command goes on"
    with pytest.raises(OSError, match=sentence):
        posthoc.save(tmp_path, 1, PowerEMA(nn.Linear(2, 2), 0.1))
    assert posthoc.snapshots(tmp_path) == []


# ------------------------------------------------------------------------------------------------------ in a run


def _config(folder, **changes):
    return tiny_config(folder, total_steps=11, ema=EMAConfig(posthoc=TRACKED, snapshot_every=2), **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on the digits."""
    folder = tmp_path_factory.mktemp("run")
    Trainer(_config(folder)).fit()
    return folder


def test_a_stopped_run_writes_the_same_snapshots(run, tmp_path, monkeypatch):
    config = _config(tmp_path)
    config = replace(config, output=replace(config.output, checkpoint_every=3))
    with monkeypatch.context() as patch:
        stop_at(patch, 9)  # after the snapshots of step 8 and the checkpoint of step 6
        with pytest.raises(StopError):
            Trainer(config).fit()
    assert max(one.step for one in posthoc.snapshots(tmp_path)) == 8
    first = tmp_path / "ema" / "step-00000002" / "0.05.safetensors"
    before = first.stat().st_mtime_ns
    Trainer(config).fit()
    assert files(tmp_path / "ema") == files(run / "ema")
    assert sorted(path.name for path in (tmp_path / "ema").iterdir()) == [f"step-{k:08d}" for k in (2, 4, 6, 8, 10, 11)]
    assert first.stat().st_mtime_ns == before
    ours, theirs = final(tmp_path, 11).posthoc, final(run, 11).posthoc
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_other_snapshots_may_be_asked_for_when_going_on_and_other_averages_not(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(StopError):
            Trainer(_config(tmp_path)).fit()
    other = EMAConfig(posthoc=(0.05, 0.15), snapshot_every=2)
    with pytest.raises(
        ValueError, match=r"holds a run with ema\.posthoc=\(0\.05, 0\.1\), and this one has \(0\.05, 0\.15"
    ):
        Trainer(replace(_config(tmp_path), ema=other)).fit()
    Trainer(replace(_config(tmp_path), ema=EMAConfig(posthoc=TRACKED, snapshot_every=5))).fit()
    found = files(tmp_path / "ema")
    assert {name.split("/")[0] for name in found} == {f"step-{k:08d}" for k in (2, 5, 10, 11)}
    theirs = files(run / "ema")
    assert all(found[name] == theirs[name] for name in found if "00000005" not in name)


def test_snapshots_of_another_run_are_not_gone_on_with(run, tmp_path):
    Trainer(_config(tmp_path)).fit()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="holds a run with seed=0, and this one has 1"):
        Trainer(_config(tmp_path, seed=1)).fit()
    assert files(tmp_path / "ema") == files(run / "ema")


def test_a_process_that_is_not_the_first_writes_none(tmp_path, monkeypatch):
    other = Trainer(_config(tmp_path))
    monkeypatch.setattr(other.processes, "of_first", lambda work: None)
    other.fit()
    assert int(other.averages[0].updates) == 11
    assert not (tmp_path / "ema").exists()


def test_load_run_takes_an_average_that_was_not_tracked(run, caplog):
    _, model, step = load_run(run, "cpu", ema_std=0.08)
    expected = posthoc.reconstruct(run, 0.08)
    assert (step, expected.snapshots) == (11, 12)
    weights = model.state_dict()
    assert expected.weights
    assert all(torch.equal(weights[name], value) for name, value in expected.weights.items())
    assert "the average of std 0.08 at step 11 is a sum of 12 snapshots; its profile is off by 0.0" in caplog.text


def test_load_run_takes_it_as_it_was_after_an_earlier_step(run):
    _, model, step = load_run(run, "cpu", ema_std=0.08, step=8)
    expected, weights = posthoc.reconstruct(run, 0.08, step=8), model.state_dict()
    assert step == 8
    assert all(torch.equal(weights[name], value) for name, value in expected.weights.items())
    with pytest.raises(ValueError, match=r"has no snapshot of step 7; choose one of 2, 4, 6, 8, 10, 11"):
        load_run(run, "cpu", ema_std=0.08, step=7)


def test_sample_and_eval_with_an_average_that_was_not_tracked(run, capsys):
    options = [str(run), "--count", "20", "--ema-std"]
    pictures = []
    for std, name in ((0.05, "0_05"), (0.08, "0_08")):
        assert main(["sample", *options, str(std)]) == 0
        pictures.append((run / "samples" / f"step-00000011-1-step-20-samples-ema-{name}.png").read_bytes())
        assert main(["eval", *options, str(std)]) == 0
        scores = json.loads((run / "evaluation" / f"step-00000011-1-step-20-samples-ema-{name}.json").read_text())
        assert (scores["step"], scores["ema_std"]) == (11, std)
        assert f"frechet_all         {scores['frechet_all']:.4f}" in capsys.readouterr().out
    assert pictures[0] != pictures[1]
    for std, words in (("0.5", "standard deviation 0.5 of an average is outside"), ("0.01", "std 0.01 cannot be had")):
        assert main(["sample", *options, std]) == 2
        assert words in capsys.readouterr().err


def test_a_run_without_snapshots_says_how_to_get_them(tmp_path, capsys):
    Trainer(tiny_config(tmp_path, total_steps=1)).fit()
    capsys.readouterr()
    assert not (tmp_path / "ema").exists()
    for command in ("sample", "eval"):
        assert main([command, str(tmp_path), "--ema-std", "0.08"]) == 2
        sentence = capsys.readouterr().err
        assert sentence.count("\n") == 1
        assert "has no snapshots" in sentence
        assert "started with ema.posthoc, such as [0.05, 0.1]" in sentence


def test_the_estimated_memory_counts_them(tmp_path):
    plain, with_two = (dry_run.plan(make(tmp_path / "none")) for make in (tiny_config, _config))
    assert with_two.bytes - plain.bytes == 8 * plain.trained
