"""Evaluations by several processes: the files and the score of one, and a failure that costs a score and no more."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from failing_evaluations import image_config
from runs import files, final, soflow, write_images

from soflow_fast import Trainer, build, checkpoint, cli, distributed, evaluate
from soflow_fast.distributed import OtherProcessError, Processes

SAMPLES = [f"{i:06d}.png" for i in range(30)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in two processes with failing evaluations: its folder, the reports by rank, and what was printed."""
    folder = tmp_path_factory.mktemp("shared")
    write_images(folder / "images")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).with_name("failing_evaluations.py")
    result = subprocess.run(
        [sys.executable, *torchrun, str(script), str(folder / "run"), str(folder / "images")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return folder / "run", [json.loads((folder / f"run-{rank}.json").read_text()) for rank in (0, 1)], result


def test_two_processes_write_and_score_the_samples_of_one(trained):
    run, (first, second), result = trained
    folder = run / "evaluation"
    assert files(folder / "during-training") == files(folder / "alone")
    assert sorted(files(folder / "alone")) == SAMPLES
    # three of five batches of seven, and two; the second process failed once before it wrote any
    assert first["written"] == 3 * SAMPLES[:21]
    assert second["written"] == 2 * SAMPLES[21:]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = {line["step"]: line["evaluation/frechet"] for line in lines if "evaluation/frechet" in line}
    assert scored == {6: float(result.stdout)}


def test_a_failure_in_any_process_costs_the_score_and_not_the_training(trained):
    run, (first, second), result = trained
    assert first["weights"] == second["weights"]
    assert final(run).step == 6
    assert sorted(re.findall("the evaluation at step .*", result.stderr)) == [
        "the evaluation at step 2 failed, and training goes on: process 1 failed with OSError: the disk is full",
        "the evaluation at step 2 failed, and training goes on: the disk is full",
        "the evaluation at step 4 failed, and training goes on: the disk is full",
    ]
    assert checkpoint.best(run / "checkpoints") == checkpoint.path_of(run / "checkpoints", 6)


def test_the_command_shares_the_work_and_the_first_process_alone_prints(tmp_path, capsys):
    write_images(tmp_path / "images")
    Trainer(image_config(tmp_path / "run", tmp_path / "images")).fit()
    capsys.readouterr()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert cli.main(["eval", str(tmp_path / "run"), "--seed", "3"]) == 0
    finally:
        torch.set_num_threads(threads)
    printed, before = capsys.readouterr().out, files(tmp_path / "run")
    (score,) = (tmp_path / "run" / "evaluation").glob("*.json")
    score.unlink()
    result = soflow("eval", str(tmp_path / "run"), "--seed", "3", processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout == printed
    assert files(tmp_path / "run") == before


def test_an_image_that_cannot_be_read_ends_all_processes_in_one_sentence(tmp_path):
    write_images(tmp_path / "images")
    Trainer(image_config(tmp_path / "run", tmp_path / "images")).fit()
    bad = tmp_path / "images" / "class1" / "7.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    before = files(tmp_path / "run")
    result = soflow("eval", str(tmp_path / "run"), processes=2)
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("soflow: ")]
    assert [line.partition(" (")[0] for line in said] == [f"soflow: process 0 of 2: the image {bad} cannot be read"]
    assert files(tmp_path / "run") == before


# ------------------------------------------------------------------------------------------- in this process alone


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("n", "batch"), [(2, 125), (30, 7), (28, 7), (56, 7), (57, 7)])
def test_shares_are_whole_batches_of_all_samples(n, batch, world_size):
    processes = [object.__new__(Processes) for _ in range(world_size)]
    for rank, process in enumerate(processes):
        process.rank, process.world_size = rank, world_size
    shares = [process.share(n, batch) for process in processes]
    assert [i for share in shares for i in share] == list(range(n))
    assert all(share.start % batch == 0 for share in shares if share)
    assert shares[0]
    counts = [-(-len(share) // batch) for share in shares]
    assert max(counts) - min(counts) <= 1


class _FirstOfTwo(Processes):
    """The first of two processes, whose other writes nothing and has these results, of which an error is raised."""

    def __init__(self, *others):
        self.rank, self.world_size, self.device, self.others = 0, 2, torch.device("cpu"), list(others)

    def of_all(self, work):
        result, other = work(), self.others.pop(0) if self.others else None
        if isinstance(other, Exception):
            raise other
        return [result, other]


def test_samples_that_the_first_process_does_not_see_are_no_score(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "_SEEN_WITHIN_SECONDS", 0)
    write_images(tmp_path / "images")
    config = image_config(tmp_path, tmp_path / "images")
    model = build.build_model(config)
    with pytest.raises(ValueError, match=r"the first process sees 21 of the 30 samples in .* that all processes share"):
        evaluate.evaluate(model, config, tmp_path / "samples", processes=_FirstOfTwo())


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ([6, OtherProcessError("process 1 failed with OSError: the disk is full")], None),  # process 1 says it
        ([8], "went on while its weights were read, and not all processes have the same step; choose it by --step"),
    ],
)
def test_what_ends_the_command_in_all_processes(tmp_path, monkeypatch, capsys, others, sentence):
    write_images(tmp_path / "images")
    Trainer(image_config(tmp_path / "run", tmp_path / "images")).fit()
    capsys.readouterr()
    before = files(tmp_path / "run")
    monkeypatch.setattr(distributed, "join", lambda device: _FirstOfTwo(*others))
    assert cli.main(["eval", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    if sentence is None:
        assert said == ""
    else:
        assert said.startswith("soflow: ")
        assert sentence in said
        assert said.count("\n") == 1
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("command", [["sample", "run"], ["encode", "in", "out", "--vae", "x"], ["demo"]])
def test_commands_for_one_process_refuse_more(monkeypatch, capsys, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(command) == 2
    assert capsys.readouterr().err == (
        f"soflow: process 1 of 2: soflow {command[0]} works in one process, and WORLD_SIZE=2 says that there are more; "
        "start it without torchrun\n"
    )


def test_a_run_reads_its_reference_once_though_it_changes(tmp_path, monkeypatch):
    """All scores of a process are of the same images; links are followed and hidden files left out, as in training."""
    write_images(tmp_path / "images")
    write_images(tmp_path / "elsewhere", n=40)
    (tmp_path / "real" / "more").mkdir(parents=True)
    (tmp_path / "real" / "more" / "of").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "real" / "._0.png").touch()
    config = image_config(tmp_path / "run", tmp_path / "images", every=2)
    run = Trainer(replace(config, evaluation=replace(config.evaluation, reference=str(tmp_path / "real"))))
    read, walk = [], evaluate._image_files

    def changing(folder):
        read.append(len(list(walk(folder))))
        yield from walk(folder)
        (tmp_path / "real" / "new.png").write_bytes((tmp_path / "elsewhere" / "class0" / "0.png").read_bytes())

    monkeypatch.setattr(evaluate, "_image_files", changing)
    run.fit()
    assert read == [40]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("evaluation/frechet" in line for line in lines) == 3
