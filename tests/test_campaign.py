"""The campaign runs each stage once for a commit and a card; the README's figures are those of the files."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import rates
import throughput
import torch
from _rows import Workload

from soflow_fast.kernels import fused

ROOT = Path(__file__).parents[1]


@pytest.fixture
def campaign():
    return importlib.import_module("campaign")


@pytest.fixture
def run(campaign, tmp_path, capsys):
    """Calls the command with results in a temporary folder: exit code and what it printed."""

    def run(action: str, *arguments: str):
        places = ["--folder", str(tmp_path / "results"), "--cache", str(tmp_path / "cache")]
        code = campaign.main([action, "--smoke", *places, *arguments])
        return code, capsys.readouterr().out

    return run


def test_a_stage_runs_once_and_again_where_it_is_partial_or_of_another_commit(run, tmp_path):
    path = tmp_path / "results" / "rates.json"
    code, out = run("run", "--only", "rates")
    assert (code, out.count("rates.py")) == (0, 1)
    path.write_text(json.dumps({**json.loads(path.read_text()), "partial": True}))
    assert "begun" in run("plan", "--only", "rates")[1]
    assert run("run", "--only", "rates")[1].count("rates.py") == 1
    report = json.loads(path.read_text())
    assert "partial" not in report
    assert report["smoke"] is True
    assert report["models"][0]["floor_ms"] > 0
    attention = {row["part"]: row for row in report["models"][0]["rows"] if "attention by" in row["part"]}
    assert attention["attention by flash, both ways"]["ms"] > 0
    if report["environment"]["gpu"] is None:
        assert "takes bfloat16 and float16" in attention["attention by cuDNN, guidance"]["refused"]

    assert run("run", "--only", "rates")[1].count("rates.py") == 0

    report["environment"]["commit"] = {"hash": "0123456789", "dirty": False}
    path.write_text(json.dumps(report))
    assert "to do" in run("plan", "--only", "rates")[1]
    assert run("run", "--only", "rates")[1].count("rates.py") == 1
    assert json.loads(path.with_suffix(".01234567.json").read_text()) == report

    run("report", "--only", "rates")
    assert "fc1, gradient of the weight" in (tmp_path / "results" / "REPORT.md").read_text()


def test_a_table_is_done_when_it_has_every_row(run, tmp_path):
    assert run("run", "--only", "ladder_b4", "--minutes", "5")[0] == 0
    path = tmp_path / "results" / "ladder_b4.json"
    report = json.loads(path.read_text())
    assert report["rows"]["soflow/public"]["ms_per_step"] > 0
    assert "done" in run("plan", "--only", "ladder_b4")[1]
    path.write_text(json.dumps({**report, "rows": {}}))
    assert "begun" in run("plan", "--only", "ladder_b4")[1]


def test_a_report_that_cannot_be_read_is_set_aside(campaign, tmp_path):
    here, stage = campaign.Campaign(tmp_path, tmp_path, smoke=True), campaign.STAGES[0]
    here._json(stage).write_text('{"environment": {"py')
    assert here.state(stage) == "to do"
    here._set_aside(stage)
    assert [path.name for path in tmp_path.iterdir()] == ["correctness.json.unreadable"]


def test_reports_of_two_cards_are_set_aside_apart(campaign, tmp_path):
    here, stage = campaign.Campaign(tmp_path, tmp_path, smoke=True), campaign.STAGES[0]
    for card in ("NVIDIA H200", "NVIDIA H100 80GB"):
        of_it = {"gpu": {"name": card}, "commit": {"hash": "0123456789"}}
        here._json(stage).write_text(json.dumps({"environment": of_it}))
        here._set_aside(stage)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"correctness.01234567.{card}.json" for card in ("NVIDIA-H200", "NVIDIA-H100-80GB")}


def test_tests_that_are_interrupted_leave_what_they_found(run, campaign, monkeypatch, tmp_path):
    slow = tmp_path / "test_of_two.py"
    slow.write_text("import time\ndef test_first(): pass\ndef test_second(): time.sleep(100)\n")
    command = campaign.Campaign._command
    monkeypatch.setattr(campaign.Campaign, "_command", lambda *given: [*command(*given)[:-1], str(slow)])
    monkeypatch.setattr(campaign, "STAGES", (campaign.Stage("correctness", "pytest", seconds=8),))
    monkeypatch.setattr(campaign, "_GRACE", 5.0)
    code, _ = run("run", "--minutes", "0.25")
    assert code == 1
    report = json.loads((tmp_path / "results" / "correctness.json").read_text())
    assert (report["tests"], report["partial"], report["failure"]) == (1, True, [])
    assert "begun" in run("plan")[1]


def test_tests_that_were_killed_are_begun_and_lose_nothing_found_before(campaign, tmp_path):
    here, stage = campaign.Campaign(tmp_path, tmp_path, smoke=True), campaign.STAGES[0]
    here._write_test_report(stage, "stopped, the time was over")
    assert here.state(stage) == "begun"
    here._junit(stage).write_text("<testsuite><testcase name='test_first'/></testsuite>")
    for cut in ("", "<testsuite><testcase"):
        here._write_test_report(stage, "stopped, the time was over")
        here._junit(stage).write_text(cut)
        assert json.loads((tmp_path / "correctness.json").read_text())["tests"] == 1


def test_tests_take_their_time_at_most_and_come_last_where_they_begin_anew(campaign, monkeypatch, tmp_path):
    here, given = campaign.Campaign(tmp_path, tmp_path, smoke=False), {}
    monkeypatch.setattr(here, "_run", lambda stage, left: given.update({stage.name: left}) or True)
    stages = [stage for stage in campaign.STAGES if stage.name in ("correctness", "correctness_step", "rates")]
    monkeypatch.setattr(here, "state", lambda stage: "begun" if stage.name == "correctness" else "to do")
    here.run(stages, time.monotonic() + 500.0)
    assert list(given) == ["rates", "correctness_step", "correctness"]
    assert [round(given[name]) for name in ("correctness", "correctness_step")] == [240, 180]
    assert given["rates"] > 400
    here.run(stages, time.monotonic() + 3000.0)  # enough for all of them
    assert given["correctness"] > 2500


def test_tables_are_compiled_while_tests_run_and_beside_nothing_that_is_timed(campaign, monkeypatch, tmp_path):
    here, begun, beside = campaign.Campaign(tmp_path, tmp_path, smoke=False), [], {}
    here.gib = 139.0

    def start(command, log, variables):
        begun.append(subprocess.Popen(["sleep", "100"], preexec_fn=os.setpgrp))
        commands.append(command)
        return begun[-1]

    def runs(stage, left):
        beside[stage.name] = [process.poll() is None for process in begun]
        return True

    commands = []
    monkeypatch.setattr(here, "_start", start)
    monkeypatch.setattr(here, "_run", runs)
    stages = [
        stage for stage in campaign.STAGES if stage.name in ("correctness", "throughput_xl2_256", "throughput_b4")
    ]
    here.run(stages, time.monotonic() + 331.0)
    assert beside["correctness"] == [True, True]
    assert [command[command.index("--model") + 1] for command in commands] == ["DiT-XL/2", "DiT-B/4"]
    assert all(command[-1] == "--only-ahead" for command in commands)
    options = throughput.parsed(commands[0][5:-1])
    assert options.rows[0] == "soflow/fast"
    assert beside.keys() == {stage.name for stage in stages}
    assert beside["throughput_xl2_256"] == beside["throughput_b4"] == [False, False]


def test_what_compiles_for_a_table_may_take_a_part_of_its_time(campaign, tmp_path):
    here, stage = campaign.Campaign(tmp_path, tmp_path, smoke=False), campaign.STAGES[1]
    ends, lasts = (subprocess.Popen(["sleep", seconds], preexec_fn=os.setpgrp) for seconds in ("1", "100"))
    here._end_ahead({stage.name: ends, "another": lasts}, stage, time.monotonic() + 60.0)
    assert (ends.returncode, lasts.returncode) == (0, -signal.SIGKILL)


def test_a_table_goes_on_in_the_same_call_where_a_row_cost_it_the_gpu(campaign, monkeypatch, tmp_path):
    here, calls = campaign.Campaign(tmp_path, tmp_path, smoke=False), []
    (stage,) = (stage for stage in campaign.STAGES if stage.name == "throughput_b4")

    def runs(stage, left):
        calls.append(left)
        rows = {f"row {i}": {} for i in range(min(2, len(calls)))}
        here._json(stage).write_text(json.dumps({"environment": here.here, "rows": rows}))
        return False

    monkeypatch.setattr(here, "_run", runs)
    assert not here._run_on(stage, 500.0)
    assert len(calls) == 3  # two that added a row, and one that did not
    calls.clear()
    here._json(stage).unlink()
    assert not here._run_on(stage, 100.0)
    assert len(calls) == 1


def test_an_interrupted_campaign_ends_its_stage(campaign, monkeypatch, tmp_path):
    here, stage = campaign.Campaign(tmp_path, tmp_path, smoke=True), campaign.STAGES[1]
    monkeypatch.setattr(campaign, "_GRACE", 1.0)
    monkeypatch.setattr(here, "_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(100)"])
    begun = []

    def interrupted(process, left):
        begun.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(here, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        here._run(stage, 60.0)
    assert begun[0].poll() is not None


def test_too_little_time_leaves_a_stage_for_the_next_call(run, tmp_path):
    code, out = run("run", "--only", "errors", "--minutes", "0.1")
    assert code == 0
    assert "left for the next call" in out
    assert not (tmp_path / "results" / "errors.json").exists()


def test_a_stage_of_pieces_goes_on_with_its_file(run, tmp_path):
    path = tmp_path / "results" / "kernels.json"
    assert run("run", "--only", "kernels", "--minutes", "4")[0] == 0
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "partial": True}))
    assert "begun" in run("plan", "--only", "kernels")[1]
    assert run("run", "--only", "kernels", "--minutes", "4", "--archive", str(tmp_path / "results.tar.gz"))[0] == 0
    again = json.loads(path.read_text())
    assert (again["rows"], again["left_out"], "partial" in again) == (whole["rows"], [], False)
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert json.load(archive.extractfile("results/kernels.json")) == again


def test_a_stage_that_runs_is_in_the_archive(campaign, monkeypatch, tmp_path, capsys):
    folder, packed = tmp_path / "results", tmp_path / "results.tar.gz"
    folder.mkdir()
    (folder / "rates.json.unfinished").touch()
    writes = "import pathlib, time; pathlib.Path('rates.json').write_text('[1]'); time.sleep(100)"
    here = campaign.Campaign(folder, tmp_path, smoke=True, archive=packed)
    process = subprocess.Popen([sys.executable, "-c", writes], cwd=folder, start_new_session=True)
    monkeypatch.setattr(campaign, "_ARCHIVED", 0.2)
    monkeypatch.setattr(campaign, "_GRACE", 1.0)
    assert here._wait(process, 4.0) == "stopped, the time was over"
    with tarfile.open(packed) as archive:
        assert archive.getnames() == ["results/rates.json"]
        assert json.load(archive.extractfile("results/rates.json")) == [1]
    here.archive = tmp_path / "missing" / "results.tar.gz"
    here._pack()
    assert "not archived" in capsys.readouterr().out


def test_a_table_is_begun_with_time_for_one_row(campaign, monkeypatch, tmp_path):
    here, begun = campaign.Campaign(tmp_path, tmp_path, smoke=False), []
    here.gib = 139.0
    monkeypatch.setattr(here, "_run", lambda stage, left: begun.append(stage.name) or True)
    tables = [stage for stage in campaign.STAGES if stage.script == "throughput.py"]
    here.run(tables, time.monotonic() + 230.0)
    assert begun == [stage.name for stage in tables if "_xl2_" not in stage.name and "_l2_" not in stage.name]
    here.run(tables, time.monotonic() + 335.0)
    assert set(begun) == {stage.name for stage in tables}


def test_photographs_are_begun_with_time_for_one_row(campaign, monkeypatch, tmp_path):
    photographs = importlib.import_module("photographs")
    (stage,) = (stage for stage in campaign.STAGES if stage.name == "photographs")
    command = campaign.Campaign(tmp_path, tmp_path, smoke=False)._command(stage, float(stage.least))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = photographs.parsed(command[2:])
    assert options.limit > options.seconds + photographs._PREPARATION


def test_a_stage_that_fails_is_named_with_the_end_of_its_log(run, campaign, monkeypatch):
    broken = campaign.Stage("broken", "rates.py", smoke=("--batch", "3"))
    monkeypatch.setattr(campaign, "STAGES", (broken,))
    code, out = run("run")
    assert code == 1
    assert "--batch 3 is not a multiple of 4" in out
    assert "failed: broken" in out


def test_without_a_gpu_only_a_smoke_run(campaign, monkeypatch, capsys):
    monkeypatch.setattr(campaign, "environment", lambda: {"gpu": None})
    with pytest.raises(SystemExit) as stopped:
        campaign.main(["run"])
    assert stopped.value.code == 2
    assert "none is visible" in capsys.readouterr().err


def test_the_committed_texts_are_what_the_results_give(capsys):
    assert importlib.import_module("readme_results").main(["--check"]) == 0, capsys.readouterr().err


def test_a_figure_changed_by_hand_is_noticed(monkeypatch, tmp_path):
    writer = importlib.import_module("readme_results")
    readme, others = tmp_path / "README.md", tmp_path / "RESULTS.md"
    readme.write_text(f"# before\n\n{writer.BEGIN}{writer.END}## after\n")
    monkeypatch.setattr(writer, "README", readme)
    monkeypatch.setattr(writer, "ALL", others)
    assert writer.main([]) == 0
    assert writer.main(["--check"]) == 0
    assert readme.read_text().startswith("# before")
    assert readme.read_text().endswith("## after\n")
    assert "fused" in others.read_text()
    others.write_text(others.read_text().replace("e-07", "e-09"))
    assert writer.main(["--check"]) == 1


def test_the_profile_sorts_kernels_and_names_the_largest_gaps():
    profile = importlib.import_module("profile_step")
    kernels = {
        "nvjet_hsh_128x256": {"ms": 60.0, "calls": 10.0},
        "void pytorch_flash::flash_fwd_kernel": {"ms": 10.0, "calls": 4.0},
        "_keys_backward_kernel": {"ms": 2.0, "calls": 4.0},
        "_attention_difference_kernel": {"ms": 4.0, "calls": 2.0},
        "_large_change_kernel": {"ms": 1.0, "calls": 2.0},
        "_adaln_backward_kernel": {"ms": 9.0, "calls": 2.0},
        "_adamw_kernel": {"ms": 3.0, "calls": 1.0},
        "triton_poi_fused_gelu_0": {"ms": 7.0, "calls": 3.0},
    }
    floor = {"products": 55.0, "attention": 11.5, "attention difference": 5.0}
    report = profile.summary(100.0, kernels, floor)
    assert {name: kind["ms"] for name, kind in report["kinds"].items()} == {
        "products": 60.0,
        "attention": 12.0,
        "fused kernels": 9.0,
        "Inductor's kernels": 7.0,
        "attention difference": 5.0,
        "idle": 4.0,
        "update": 3.0,
    }
    assert report["largest_gaps"] == ["fused kernels", "Inductor's kernels", "products"]
    assert report["floor_ms"] == 71.5


def test_a_profile_without_kernels_is_none(monkeypatch, tmp_path, capsys):
    profile, path = importlib.import_module("profile_step"), tmp_path / "profile.json"
    monkeypatch.setattr(profile, "run", lambda *_: (400.0, {}))
    assert profile.main(["--smoke", "--json", str(path)]) == 1
    assert "the profiler saw no kernel in 5 steps of 400.0 ms" in capsys.readouterr().err
    assert not path.exists()


def test_the_floor_is_of_the_attention_of_the_step(monkeypatch):
    asked = []
    monkeypatch.setattr(rates, "network_attention", lambda q, k, v, backend: asked.append(backend) or q * k * v)
    for part in rates.parts((8, 64, 2, 2), 4, "cpu", torch.float32):
        if part.count and "attention," in part.name:
            part.make()()
    assert asked == ["sdpa", "sdpa"]


@pytest.fixture
def listed(monkeypatch):
    """The parts of ``rates.py``: one, and one that fails."""

    def fails():
        raise ValueError("no such attention")

    listed = [rates.Part("fc1, gradient", 1e3, 2, lambda: int), rates.Part("attention, guidance", 1e3, 2, fails)]
    monkeypatch.setattr(rates, "parts", lambda *_: listed)
    monkeypatch.setattr(rates, "copy_bandwidth", lambda timer: 1.0)
    monkeypatch.setattr(rates, "launch_floor_ms", lambda timer: 1e-6)
    return listed


def test_a_part_that_fails_costs_the_floor_itself_alone(listed, tmp_path, capsys):
    path = tmp_path / "rates.json"
    assert rates.main(["--smoke", "--json", str(path)]) == 1
    report = json.loads(path.read_text())
    (model,) = report["models"]
    assert (model["without"], "partial" in report) == (["attention, guidance"], False)
    assert [row["ms"] is None for row in model["rows"]] == [False, True]
    assert model["rows"][1]["refused"] == "ValueError: no such attention"
    assert model["floor_ms"] == 2 * (model["rows"][0]["ms"] - 1e-6) > 0
    assert "the floor is without attention, guidance" in capsys.readouterr().out


def test_rates_that_are_interrupted_are_kept(listed, tmp_path):
    path = tmp_path / "rates.json"

    def interrupted():
        raise KeyboardInterrupt

    listed[1:] = [rates.Part("fc2, gradient", 1e3, 2, interrupted)]
    with pytest.raises(KeyboardInterrupt):
        rates.main(["--smoke", "--json", str(path)])
    report = json.loads(path.read_text())
    assert (report["partial"], report["models"][0]["without"]) == (True, ["fc2, gradient"])
    assert report["models"][0]["floor_ms"] > 0


def test_a_profile_without_all_rates_has_no_floor(tmp_path, capsys):
    profile, path = importlib.import_module("profile_step"), tmp_path / "rates.json"
    workload = Workload("DiT-XL/2", 256, "cpu")
    row = {"part": "fc1, gradient", "ms_per_step": 2.0}
    model = {"model": "DiT-XL/2", "batch": 256, "without": [], "rows": [row]}

    def known(text: str) -> tuple:
        path.write_text(text)
        return profile.known_floors(path, workload)

    assert "No such file" in profile.known_floors(path, workload)[1]
    assert known("{") == ({}, "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)")
    assert known(json.dumps({"models": []})) == ({}, "--rates has no DiT-XL/2 at batch 256; run rates.py for it")
    cut = {**model, "without": ["fc2, gradient"]}
    assert known(json.dumps({"models": [cut]})) == ({}, "--rates has no time of fc2, gradient")
    assert capsys.readouterr().err.count("no floor is known") == 4
    assert known(json.dumps({"models": [model]})) == ({"products": 2.0}, None)


def test_every_kernel_is_checked_natively(campaign):
    families = {family.__name__.rpartition(".")[2] for family in fused._FAMILIES}
    assert families <= set(campaign.NATIVE_TESTS["correctness"])


def test_a_stage_that_needs_a_larger_card_is_left_out(campaign, monkeypatch, tmp_path, capsys):
    small = campaign.Campaign(tmp_path, tmp_path, smoke=False)
    small.gib = 80.0
    stages = [stage for stage in campaign.STAGES if stage.gib]
    assert {stage.name for stage in stages} == {"throughput_xl2_256", "profile_xl2"}
    monkeypatch.setattr(small, "_run", lambda *_: pytest.fail("it was run"))
    assert small.run(stages, math.inf) == []
    assert "throughput_xl2_256: needs 100 GiB of GPU memory, this card has 80" in capsys.readouterr().out
    small.gib = 139.0
    assert {small.state(stage) for stage in stages} == {"to do"}
