"""Every measurement on one GPU, in pieces: plans it, runs what is left within the given minutes, and reports.

    python benchmarks/campaign.py plan|run|report [--folder benchmarks/results/h200] [--minutes 9] [--only STAGE ...]

``run`` takes the stages in order: correctness of every kernel first, while the first tables are compiled, then DiT-
XL/2, DiT-B/4 and the rest; tests that were cut short begin anew, behind all else. Each is a command of this folder that
writes one JSON; a stage whose JSON is complete, of this commit and this card, is not run again, so the same call
repeated comes to the end. Figures are compared only inside one JSON. Compiled code is kept in ``--cache`` from call to
call. Where a machine keeps nothing in between, or may be gone at any time, ``--archive`` has the folder in one file,
made anew every 20 s; unpack it before the next call. A stage that leaves no JSON, or a partial one, is gone on with by
the next call; each leaves its log. ``report`` writes the folder's REPORT.md. The package must be installed in place
(``pip install --editable .``), as its tests run from the checkout. Where the files are copied without their git
history, ``git rev-parse HEAD > COMMIT`` before tells the results their commit. ``--smoke`` runs the smallest form of
every stage, on a CPU too: it tries the campaign, and its figures mean nothing.

A folder belongs to one card. What 30 minutes are best spent on, in three calls:

    run --minutes 9                                                   H200, 139 GiB: the stages as they come
    run --minutes 9 --folder benchmarks/results/h100 --only correctness rates throughput_b4
                                                                      80 GiB: XL/2 at batch 256 is too large there
"""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import IO

import torch
from _measure import environment, identity, write_report
from _rows import selected
from _stages import NATIVE_TESTS, STAGES, Stage
from readme_results import sections

ROOT = Path(__file__).parents[1]

_SMOKE_ROWS = ("soflow/public",)  # eager: nothing to compile

# A stage that takes all the time is interrupted this long before the end, so that it can write what it has.
_GRACE = 15.0

# So many tables are compiled while tests run.
_AHEAD = 2

# A stage that runs is archived this often, in seconds.
_ARCHIVED = 20.0


class Campaign:
    """What is done and what is left, in one folder.

    Args:
        folder: of the JSON files and logs. cache: of compiled code. smoke: whether stages run in their smallest form.
        archive: a ``.tar.gz`` of the folder, written while a stage runs and after it.
    """

    def __init__(self, folder: Path, cache: Path, smoke: bool, archive: Path | None = None):
        self.folder, self.cache, self.smoke, self.archive = folder, cache, smoke, archive
        self.here = environment()
        self.gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0

    def state(self, stage: Stage) -> str:
        """``done``, ``begun``, ``to do`` or, if the card has too little memory, ``too large``.

        Results of another commit or card, and what cannot be read, count for nothing.
        """
        if not self.smoke and self.gib < stage.gib:
            return "too large"
        report = self._report(stage)
        if report is None or identity(report["environment"]) != identity(self.here):
            return "to do"
        finished = not report.get("partial")
        if stage.rows:
            finished = set(selected(self._rows(stage))) <= set(report["rows"])
        return "done" if finished else "begun"

    def _report(self, stage: Stage) -> dict | None:
        """The stage's JSON; None where there is none that can be read."""
        try:
            return json.loads(self._json(stage).read_text())
        except (OSError, ValueError):
            return None

    def _rows(self, stage: Stage) -> tuple[str, ...]:
        return _SMOKE_ROWS if self.smoke and stage.rows else stage.rows

    def run(self, stages: list[Stage], end: float) -> list[str]:
        """Runs what is left and fits until ``end`` of ``time.monotonic()``; the names of the stages that failed."""
        failed, ahead = [], {}
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background, and by its children
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for stage in sorted(stages, key=lambda stage: stage.script == "pytest" and self.state(stage) == "begun"):
                state = self.state(stage)
                if state == "too large":
                    print(
                        f"{stage.name}: needs {stage.gib} GiB of GPU memory, this card has {self.gib:.0f}", flush=True
                    )
                if state in ("done", "too large"):
                    continue
                if stage.script == "pytest":
                    ahead = ahead or self._begin_ahead(stages, end)
                else:  # may be timed
                    self._end_ahead(ahead, stage, end)
                left = end - time.monotonic()
                if left < self._least(stage, stage.name in ahead):
                    print(f"{stage.name}: {left:.0f} s are too few, left for the next call", flush=True)
                    continue
                if stage.script == "pytest":  # begins anew in every call, and must not take what others could have
                    others = sum(
                        one.seconds for one in stages if one is not stage and self.state(one) in ("to do", "begun")
                    )
                    left = min(left, max(stage.seconds, left - others))
                if not self._run_on(stage, left):
                    failed.append(stage.name)
                self._pack()
        finally:
            self._end_ahead(ahead)
        return failed

    def _least(self, stage: Stage, compiled: bool) -> float:
        """Seconds without which a stage is not begun."""
        if stage.rows or stage.pieces:
            return min(stage.seconds, stage.least / 2 if compiled else stage.least)
        return stage.seconds

    def _run_on(self, stage: Stage, left: float) -> bool:
        """Runs a stage, a table again for as long as a row costs its process the GPU; whether it succeeded."""
        end = time.monotonic() + left
        while True:
            before = self._rows_done(stage)
            if self._run(stage, end - time.monotonic()):
                return True
            went_on = self._rows_done(stage) > before and self.state(stage) == "begun"
            if not went_on or end - time.monotonic() < stage.least / 2:
                return False

    def _rows_done(self, stage: Stage) -> int:
        return len((self._report(stage) or {}).get("rows", ())) if stage.rows else 0

    def _begin_ahead(self, stages: list[Stage], end: float) -> dict[str, subprocess.Popen]:
        """Begins to compile the tables that come next: tests leave the time for it, as nothing in them is timed."""
        tables = [one for one in stages if one.script == "throughput.py" and self.state(one) in ("to do", "begun")]
        begun = {}
        for i, stage in enumerate(() if self.smoke else tables[:_AHEAD]):
            command = ["nice", "-n", str(10 * i), *self._command(stage, end - time.monotonic()), "--only-ahead"]
            with (self.folder / f"{stage.name}.ahead.log").open("w") as log:
                begun[stage.name] = self._start(command, log, {})
        return begun

    def _end_ahead(self, ahead: dict[str, subprocess.Popen], stage: Stage | None = None, end: float = 0.0) -> None:
        """Ends what compiles beside; what compiles for this stage may take a good part of its time."""
        for name, process in ahead.items():
            if stage is not None and name == stage.name:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(0.0, 0.4 * (end - time.monotonic())))
            self._kill(process)

    def _pack(self) -> None:
        """Writes the archive, if there is to be one, while a stage may be writing its files."""
        if not self.archive:
            return
        unfinished = self.archive.with_name(self.archive.name + ".unfinished")
        try:
            with tarfile.open(unfinished, "w:gz") as archive:
                for path in sorted(self.folder.iterdir()):
                    if path.is_file() and path.suffix != ".unfinished":
                        content = path.read_bytes()  # of one moment, as its size
                        member = tarfile.TarInfo(f"{self.folder.name}/{path.name}")
                        member.size, member.mtime = len(content), int(time.time())
                        archive.addfile(member, io.BytesIO(content))
            unfinished.replace(self.archive)
        except OSError as error:  # must not cost the stage that runs
            print(f"not archived: {error}", flush=True)

    def _run(self, stage: Stage, left: float) -> bool:
        path, log = self._json(stage), self.folder / f"{stage.name}.log"
        if path.exists() and self.state(stage) == "to do":
            self._set_aside(stage)
        command = self._command(stage, left)
        print(f"{stage.name}: {shlex.join(command[1:])}", flush=True)
        start = time.monotonic()
        # Of each of the processes of the tests.
        variables = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"} if stage.script == "pytest" else {}
        with log.open("w") as output:
            process = self._start(command, output, variables)
            try:
                code = self._wait(process, left)
            except BaseException:  # a stage must not run on beside what comes next
                self._end(process)
                raise
        if stage.script == "pytest":
            self._write_test_report(stage, code)
        state = self.state(stage)
        print(f"{stage.name}: {state}, {time.monotonic() - start:.0f} s, exit {code}", flush=True)
        if state == "to do" or code not in (0, 1):
            print("  " + "\n  ".join(log.read_text().splitlines()[-12:]), flush=True)
            return False
        return code == 0

    def _start(self, command: list[str], output: IO[str], variables: dict[str, str]) -> subprocess.Popen:
        """Starts a command in a process group of its own, and not a session: a killed campaign ends with all of it."""
        caches = {"TORCHINDUCTOR_CACHE_DIR": self.cache / "inductor", "TRITON_CACHE_DIR": self.cache / "triton"}
        variables = {**variables, **{name: str(folder.resolve()) for name, folder in caches.items()}}
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,
        )

    def _wait(self, process: subprocess.Popen, left: float) -> int | str:
        """The exit code of a process; when the time is over it is interrupted, and killed if that does not end it."""
        end = time.monotonic() + left - _GRACE
        while (still := end - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=min(still, _ARCHIVED))
            self._pack()  # the machine may be gone before the stage has ended
        self._end(process)
        return "stopped, the time was over"

    def _end(self, process: subprocess.Popen) -> None:
        """Interrupts a process, so that it writes what it has, and kills its group if that does not end it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_GRACE)
        self._kill(process)

    @staticmethod
    def _kill(process: subprocess.Popen) -> None:
        with contextlib.suppress(ProcessLookupError):  # none of its group is left
            os.killpg(process.pid, signal.SIGKILL)  # with the workers that compile for it
        process.wait()

    def _set_aside(self, stage: Stage) -> None:
        """Renames a result of another commit or card, or one that cannot be read."""
        path, report = self._json(stage), self._report(stage)
        if report is None:
            path.rename(path.with_name(path.name + ".unreadable"))
        else:
            card, commit = identity(report["environment"])
            name = commit[:8] if commit else "unknown"
            if card != identity(self.here)[0]:  # the same commit's may have been set aside too
                name += "." + re.sub(r"\W+", "-", card)
            path.rename(path.with_suffix(f".{name}.json"))

    def _command(self, stage: Stage, left: float) -> list[str]:
        if stage.script == "pytest":
            names = ["activation_difference"] if self.smoke else NATIVE_TESTS[stage.name]
            tests = [f"tests/test_{name}.py" for name in names]
            # Left out is what concerns a CPU alone: Inductor's C++ and two processes over gloo.
            chosen = ["-m", "not slow", "-k", "not two_processes", "-n", "1" if self.smoke else "8"]
            chosen += ["--dist", "loadfile"] if stage.name == "correctness_step" else []  # some break their GPU's state
            return [sys.executable, "-m", "pytest", "-v", *chosen, f"--junitxml={self._junit(stage)}", *tests]
        arguments = [a.format(folder=self.folder) for a in (stage.smoke if self.smoke else stage.arguments)]
        if stage.rows:
            arguments += ["--rows", *self._rows(stage), "--resume", "--limit", f"{left - 2 * _GRACE:.0f}"]
            arguments += ["--plot", str(self._json(stage).with_suffix(".png"))]
        if stage.pieces:
            arguments += ["--resume", "--minutes", f"{(left - 2 * _GRACE) / 60:.2f}"]
        return [sys.executable, str(Path("benchmarks") / stage.script), *arguments, "--json", str(self._json(stage))]

    def _write_test_report(self, stage: Stage, code: int | str) -> None:
        """The counts of a test run as JSON, the failures by name; of one that was killed none, and it is begun."""
        from xml.etree import ElementTree

        try:
            found = list(ElementTree.parse(self._junit(stage)).iter("testcase"))
        except (OSError, ElementTree.ParseError):
            if self._report(stage):  # of an earlier call, which has found more
                return
            found = []
        cases = [case for case in found if case.get("name")]  # one that was interrupted has none
        outcome = {
            kind: [c.get("name") for c in cases if c.find(kind) is not None] for kind in ("failure", "error", "skipped")
        }
        report = {"environment": self.here, "smoke": self.smoke, "exit": code, "tests": len(cases), **outcome}
        write_report(self._json(stage), report, partial=code not in (0, 1))
        self._junit(stage).unlink(missing_ok=True)

    def _json(self, stage: Stage) -> Path:
        return self.folder / f"{stage.name}.json"

    def _junit(self, stage: Stage) -> Path:
        return self.folder / f"{stage.name}.xml"


def main(arguments: list[str] | None = None) -> int:
    """0; 1 if a stage failed; 2 for bad input."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="campaign.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("action", choices=("plan", "run", "report"))
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results" / "h200", help="of the results")
    parser.add_argument("--cache", type=Path, default=ROOT / ".campaign_cache", help="of compiled code")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call (default %(default)s)")
    parser.add_argument("--archive", type=Path, metavar="OUT.tar.gz", help="have the folder here at any time")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--smoke", action="store_true", help="the smallest form of every stage")
    options = parser.parse_args(arguments)
    options.folder = options.folder.resolve()  # the stages run in the root of the checkout
    campaign = Campaign(options.folder, options.cache, options.smoke, options.archive)
    if campaign.here["gpu"] is None and options.action == "run" and not options.smoke:
        parser.error("the campaign needs a CUDA GPU and none is visible; --smoke tries it without")
    stages = [stage for stage in STAGES if stage.name in options.only]
    failed = []
    if options.action == "run":
        failed = campaign.run(stages, start + 60 * options.minutes)
    if options.action == "report":
        options.folder.mkdir(parents=True, exist_ok=True)
        (options.folder / "REPORT.md").write_text(f"# Campaign\n\n{sections(options.folder, options.folder)}")
    print(f"{'stage':24}{'state':>8}{'expected s':>12}")
    for stage in stages:
        print(f"{stage.name:24}{campaign.state(stage):>8}{stage.seconds:>12}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
