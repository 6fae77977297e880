"""The benchmarks of quality, sampling, loading and precision, in their smallest form; no figure of time decides."""

import itertools
import json
import math

import _rows
import cifar_recipe
import digits_quality
import loader
import photographs
import precision
import pytest
import sampling
import torch
import yaml
from _curves import seconds_to_reference
from _rows import ROWS, build
from test_interop import CIFAR10

from soflow_fast import DiT, TrainConfig
from soflow_fast.ema import EMA

TINY = {"patch_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 1}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(photographs, "TINY", TINY)
    monkeypatch.setattr(_rows, "SMALL", TINY)
    yield
    torch.compiler.reset()


def _written(path) -> dict:
    report = json.loads(path.read_text())
    assert set(report["environment"]) == {"python", "versions", "cpu", "gpu", "commit"}
    return report


# ----------------------------------------------------------------------------------------------------- photographs


@pytest.fixture(scope="module")
def small_crops():
    return photographs.crops(16, 40, 20, "cpu")


def _positions(crop, photograph):
    """Where a crop lies in a photograph, each (row, column)."""
    rows, columns = (n - 15 for n in photograph.shape[1:])
    same = (photograph == crop[:, :1, :1]).all(0)[:rows, :columns].nonzero().tolist()
    return [(i, j) for i, j in same if torch.equal(photograph[:, i : i + 16, j : j + 16], crop)]


def test_crops_are_of_their_photographs_and_differ(small_crops):
    from sklearn.datasets import load_sample_images

    images = [torch.tensor(image).permute(2, 0, 1) / 127.5 - 1 for image in load_sample_images().images]
    data, held_out = small_crops
    assert data.samples.shape == (40, 3, 16, 16)
    assert held_out.shape == (20, 3, 16, 16)
    assert data.labels.tolist() == [0] * 20 + [1] * 20
    labelled = [*zip(data.samples, data.labels.tolist(), strict=True), *zip(held_out, [0] * 10 + [1] * 10, strict=True)]
    for crop, label in labelled:
        plain, mirrored = (_positions(c, images[label]) for c in (crop, crop.flip(2)))
        assert plain or mirrored
    everything = torch.cat([data.samples, held_out]).flatten(1)
    assert len(everything.unique(dim=0)) == 60


def test_some_crops_are_mirrored(small_crops):
    from sklearn.datasets import load_sample_images

    china = torch.tensor(load_sample_images().images[0]).permute(2, 0, 1) / 127.5 - 1
    crops = small_crops[0].samples[:20]
    assert 0 < sum(not _positions(crop, china) for crop in crops) < 20


def test_crops_are_the_same_each_time(small_crops):
    again, held_out = photographs.crops(16, 40, 20, "cpu")
    assert torch.equal(again.samples, small_crops[0].samples)
    assert torch.equal(held_out, small_crops[1])


def test_frechet_distance_of_known_moments():
    """Points at ±√(D) σ_i e_i have covariance ∝ σ²: the distance is |μ|² + Σ(σ_i − σ'_i)²."""

    def points(sigma):
        axes = torch.diag(torch.tensor(sigma, dtype=torch.float64)) * math.sqrt(len(sigma) - 0.5)
        return torch.cat([axes, -axes])

    first, second = points([1.0, 2.0, 3.0]), points([2.0, 0.5, 3.0])
    assert photographs.frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    shift = torch.tensor([1.0, -2.0, 0.5])
    assert photographs.frechet_distance(first, second + shift) == pytest.approx(5.25 + 1 + 2.25, rel=1e-9)


def test_frechet_distance_is_that_of_torch_fidelity():
    from soflow_fast.fidelity import frechet_distance

    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator, dtype=torch.float64) / 8
    first, second = (torch.randn(300, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    first = first @ mixing + 0.3
    theirs = frechet_distance(first.view(-1, 1, 8, 8), second.view(-1, 1, 8, 8))
    assert photographs.frechet_distance(first, second) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "fused"),
    [("soflow/public", False), ("soflow/merged-compile", False), ("soflow/merged-compile", True)],
    ids=["published update", "torch", "one pass"],
)
def test_training_starts_as_if_nothing_had_been_timed(name, fused, small_crops):
    workload = photographs.Crops("tiny", 4, "cpu", compile=False, fused=fused, size=16)
    data = small_crops[0]
    run = photographs.Run(build(ROWS[name], workload), data, 4, seconds=60.0, learning_rate=1e-2)
    total = run.step.total_steps.item()
    assert total == max(1, round(60e3 / run.ms))
    assert int(run.step.step) == 0

    fresh = build(ROWS[name], workload)
    fresh.ema, fresh.total_steps = EMA(fresh.model), total
    for group in fresh.optimizer.param_groups:
        group["lr"] = 1e-2
    run._advance(run._batches(), 3)
    for x, labels in data.batches(batch=4, steps=range(3), seed=_rows.SEED, rows=slice(None)):
        fresh(x, labels)
    for key, value in fresh.ema.state_dict().items():
        torch.testing.assert_close(run.step.ema.state_dict()[key], value, rtol=1e-6, atol=1e-8)
    for ours, theirs in zip(run.step.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert run.step.model.network.final_layer.linear.weight.any()  # zero before the first step


def test_evaluation_times_end_with_the_seconds():
    series = photographs.times(300.0, 20)
    assert series[-1] == pytest.approx(300)
    ratios = [b / a for a, b in itertools.pairwise(series)]
    assert ratios == pytest.approx([50 ** (1 / 20)] * 19)
    assert photographs.times(2.0, 1) == [2.0]


def test_when_a_row_is_as_good_as_the_reference():
    def row(*distances):
        return {"points": [{"seconds": 10.0 * (i + 1), "distance": d} for i, d in enumerate(distances)]}

    rows = {"soflow/public": row(9, 7, 5), "quick": row(6, 5, 1), "never": row(9, 8, 7), "none": {"skipped": "why"}}
    assert seconds_to_reference(rows) == {"soflow/public": 30, "quick": 20, "never": None}
    assert seconds_to_reference({"quick": row(1)}) is None


_SHORT = ("--smoke", "--seconds", "0.2", "--points", "2", "--samples", "80", "--rows")


def test_photographs(tmp_path, capsys, monkeypatch):
    path, plot = tmp_path / "out.json", tmp_path / "out.png"
    names = ["soflow/public", "soflow/fast"]
    assert photographs.main([*_SHORT, *names, "--json", str(path), "--plot", str(plot)]) == 0
    report = _written(path)
    assert "figures mean nothing" in capsys.readouterr().out
    assert plot.stat().st_size > 0
    assert list(report["rows"]) == names
    public = report["rows"]["soflow/public"]
    points = public["points"]
    assert len(points) == 2
    assert points[0]["seconds"] <= points[1]["seconds"]
    assert points[1]["seconds"] >= 0.2
    assert all(point["images"] == 8 * point["steps"] and point["distance"] > 0 for point in points)
    assert public["preparation_seconds"] > 0
    assert 0.5 < report["variance_explained"] <= 1
    if not torch.cuda.is_available():
        assert "skipped" in report["rows"]["soflow/fast"]

    def again(*arguments):
        raise AssertionError("a row that is in the JSON was trained again")

    monkeypatch.setattr(photographs, "measure", again)
    assert photographs.main([*_SHORT, *names, "--json", str(path), "--resume"]) == 0
    assert _written(path)["rows"] == report["rows"]
    assert photographs.main([*_SHORT, *names, "--json", str(path), "--resume", "--batch", "4"]) == 2
    assert "batch 8 there, 4 here" in capsys.readouterr().err
    path.write_text("{}")
    assert photographs.main([*_SHORT, *names, "--json", str(path), "--resume"]) == 2
    assert "no result of this benchmark" in capsys.readouterr().err


def test_photographs_begins_nothing_it_cannot_end(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert photographs.main([*_SHORT, "soflow/public", "--json", str(path), "--limit", "0.1"]) == 0
    assert _written(path)["rows"] == {}
    assert "not begun, as the time was too short: soflow/public" in capsys.readouterr().out


@pytest.mark.parametrize("broken", [math.nan, RuntimeError("planted")], ids=["not finite", "an error"])
def test_a_row_that_breaks_costs_only_itself(broken, tmp_path, monkeypatch):
    def distance(self, model):
        if isinstance(broken, Exception):
            raise broken
        return broken

    monkeypatch.setattr(photographs.Judge, "distance", distance)
    path = tmp_path / "out.json"
    assert photographs.main([*_SHORT, "soflow/public", "soflow/merged-compile", "--json", str(path)]) == 1
    rows = _written(path)["rows"]
    assert [row["failed"] for row in rows.values()] == [True, True]
    assert all("not finite" in row["skipped"] or "planted" in row["skipped"] for row in rows.values())


def test_photographs_says_that_it_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        photographs.main([])
    assert "needs a CUDA GPU and none is visible; --smoke tries it on a CPU" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- sampling

_FEW = ("--smoke", "--batches", "1", "--precisions", "fp32", "--seconds", "0.01")


def test_sampling(tmp_path):
    path = tmp_path / "out.json"
    assert sampling.main([*_FEW, "--steps", "1", "2", "--json", str(path)]) == 0
    report = _written(path)
    assert not report["refused"]
    forms = [sampling.EAGER, sampling.COMPILED] + ([sampling.GRAPH] if torch.cuda.is_available() else [])
    assert [(row["steps"], row["form"]) for row in report["rows"]] == [(n, form) for n in (1, 2) for form in forms]
    for row in report["rows"]:
        assert row["ms"] > 0
        assert row["error"] <= 1e-3
        assert row["ratio_to_eager"] == pytest.approx(
            row["images_per_s"]
            / next(r["images_per_s"] for r in report["rows"] if (r["steps"], r["form"]) == (row["steps"], "eager"))
        )


def test_sampling_that_is_wrong_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "TOLERANCE", {"fp32": -1.0})
    path = tmp_path / "out.json"
    assert sampling.main([*_FEW, "--json", str(path)]) == 1
    report = _written(path)
    assert report["rows"]
    assert not any("ms" in row for row in report["rows"])
    assert len(report["refused"]) == len(report["rows"])


def test_sampling_lists_what_there_was_no_time_for(tmp_path):
    path = tmp_path / "out.json"
    assert sampling.main([*_FEW, "--minutes", "-1", "--json", str(path)]) == 0
    report = _written(path)
    assert (report["rows"], report["refused"]) == ([], [])
    assert report["left_out"]
    assert report["partial"]


# ---------------------------------------------------------------------------------------------------------- loader


def test_loader(tmp_path):
    path = tmp_path / "out.json"
    arguments = ["--smoke", "--workers", "0", "1", "--seconds", "0.05", "--needed", "100", "--json", str(path)]
    assert loader.main(arguments) == 0
    report = _written(path)
    assert [row["data"] for row in report["rows"]] == ["HDF5, 0 workers", "HDF5, 1 workers", "resident"]
    for row in report["rows"]:
        assert row["images_per_s"] == pytest.approx(16 * row["batches_per_s"])
        assert row["times_needed"] == pytest.approx(row["images_per_s"] / 100)
    assert report["rows"][-1]["bytes"] == 256 * 8 * 32 * 32 * 2


def test_loader_does_not_time_other_data(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "first_batch", lambda dataset, batch: torch.zeros(batch, 8, 32, 32))
    path = tmp_path / "out.json"
    assert loader.main(["--smoke", "--workers", "0", "--json", str(path)]) == 1
    assert all("refused" in row and "images_per_s" not in row for row in _written(path)["rows"])


# ------------------------------------------------------------------------------------------------------- precision


def test_precision_keeps_the_other_table_of_the_same_run(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    monkeypatch.setattr(precision, "quotient_errors", lambda net, rows, wanted: {m.name: {"0.1": 0.5} for m in wanted})
    monkeypatch.setattr(precision, "digits_network", lambda device: None)
    run = ["--smoke", "--device", "cpu", "--json", str(path)]
    assert precision.main([*run, "--weights", "digits"]) == 0
    assert precision.main([*run, "--weights", "random"]) == 0
    report = _written(path)
    assert set(report["relative_error"]) == {"digits", "random"}
    assert set(report["methods"]) == set(report["relative_error"]["random"])
    path.write_text(json.dumps({**report, "rows": 3}))
    assert precision.main([*run, "--weights", "random"]) == 0
    assert set(_written(path)["relative_error"]) == {"random"}


def test_precision_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "RATIOS", (0.0003,))
    path = tmp_path / "out.json"
    assert precision.main(["--smoke", "--device", "cpu", "--rows", "2", "--json", str(path)]) == 0
    table = _written(path)["relative_error"]["random"]
    assert table["two forwards, bf16"]["0.0003"] > 0.1
    assert table["difference, bf16, fp32 streams"]["0.0003"] < 0.01
    assert table["difference, fp32"]["0.0003"] < 1e-6


def test_methods_of_a_gpu_are_not_emulated_where_they_need_not_be():
    wanted = precision.methods(torch.device("cuda"))
    assert not any("TF32" in m.name and m.rounding for m in wanted)
    assert [m.name for m in wanted if m.tf32] == ["two forwards, TF32"]
    fused = {m.name: m for m in wanted if m.impl == "triton"}
    plain = {m.name: m for m in wanted if m.impl == "torch"}
    assert all(m.attention == "sdpa" for m in fused.values())
    assert {"difference, bf16, fp32 streams", "difference, bf16, bf16 streams", "two forwards, bf16"} <= set(plain)
    assert {f"{name}, fused" for name in plain if not plain[name].rounding and "TF32" not in name} <= {
        *fused,
        "two forwards, fp32, fused",
    }


def test_fused_methods_are_as_exact_as_the_plain_ones(monkeypatch):
    monkeypatch.setattr(precision, "RATIOS", (0.0003,))
    net = DiT(8, 4, 1, 32, 1, 1, num_classes=10)
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data.normal_(std=0.2, generator=generator)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = tuple(method for method in precision.FUSED if method.difference)
    errors = precision.quotient_errors(net.to(device), 1, wanted)
    within = {"fp32": (0, 1e-5), "bf16": (1e-4, 1e-2), "fp16": (1e-5, 1e-3)}
    for name, error in errors.items():
        low, high = next(within[dtype] for dtype in within if f", {dtype}," in name)
        assert low < error["0.0003"] < high, name


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (photographs, ["--rows", "soflow/slow"], "no row is called 'soflow/slow'"),
        (photographs, ["--batch", "6"], "batch=6 is not a multiple of 4"),
        (photographs, ["--seconds", "0"], "--seconds 0 is not positive"),
        (photographs, ["--size", "15"], "patch_size=8 does not divide input_size=15"),
        (photographs, ["--size", "16", "--crops", "2000000"], "different crops of size 16, and 1000128 are asked for"),
        (photographs, ["--samples", "64"], "must be more than the 64 components"),
        (photographs, ["--resume"], "--resume needs --json"),
        (photographs, ["--json", "missing/out.json"], "the folder of missing/out.json does not exist"),
        (sampling, ["--batches", "0"], "--batches 0 is not possible"),
        (sampling, ["--models", "DiT-Z/2"], "invalid choice: 'DiT-Z/2'"),
        (sampling, ["--json", "missing/out.json"], "the folder of missing/out.json does not exist"),
        (loader, ["--batch", "300"], "--batch 300 is more than the 256 samples"),
        (loader, ["--workers", "-1"], "--workers -1 is negative"),
        (loader, ["--device", "tpu"], "device='tpu' is not known"),
        (loader, ["--needed", "0"], "--needed 0 is not positive"),
        (precision, ["--device", "tpu"], "device='tpu' is not known"),
        (precision, ["--rows", "0"], "--rows 0 is not possible"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(script, arguments, message, capsys):
    try:
        code = script.main(["--smoke", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------------------- digits' quality


def test_quality_is_compared_on_equal_seeds():
    exact, other = list(digits_quality.VARIANTS)[:2]
    values = {exact: {0: 2.0, 1: 3.0, 2: 4.0}, other: {0: 2.5, 2: 4.7}}
    runs = [
        {"variant": variant, "seed": seed, "frechet_all": value}
        for variant, by_seed in values.items()
        for seed, value in by_seed.items()
    ]
    rows = digits_quality.summary(runs)
    assert list(rows) == [exact, other]
    assert rows[other]["seeds"] == 2
    assert rows[other]["mean"] == pytest.approx(3.6)
    assert rows[other]["above_fp32"] == pytest.approx(0.6)
    assert rows[other]["above_fp32_standard_error"] == pytest.approx(0.1)  # of 0.5 and 0.7
    assert rows[exact]["above_fp32_standard_error"] == 0
    assert digits_quality.summary(runs[:1])[exact]["standard_error"] is None


# ----------------------------------------------------------------------------------------------- the CIFAR-10 recipe


def test_the_cifar10_recipe_in_the_small(tmp_path):
    cifar_recipe.main(["--steps", "2", "--samples", "40", "--eager", "--json", str(tmp_path / "out.json")])
    runs = _written(tmp_path / "out.json")["runs"]
    assert [run["variant"] for run in runs] == list(cifar_recipe.VARIANTS)
    scores = [[run[steps][name] for steps in ("one_step", "two_steps") for name in run["one_step"]] for run in runs]
    assert all(math.isfinite(score) for score in itertools.chain(*scores))
    assert scores[0] != scores[1]
    recipe = cifar_recipe.config(str(tmp_path), 0.12, 0.13, steps=2, seed=0, compile=True)
    published = TrainConfig.from_dict(yaml.safe_load(CIFAR10))
    assert recipe.optimizer.name == published.optimizer.name
    assert (recipe.data.augment, recipe.model.preset) == (published.data.augment, published.model.preset)
    for name in ("velocity_share", "guidance_scale", "p", "eps", "time_mean", "time_std", "gap_init", "gap_end"):
        assert getattr(recipe.soflow, name) == getattr(published.soflow, name)
