"""What a run writes down survives torn lines and a full disk, and no file is filled with a progress bar."""

import errno
import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from soflow_fast import logs
from soflow_fast.logs import RunLog


def _steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _log(folder, start=0):
    return RunLog(folder, start, 1000, batch=16)


@pytest.mark.parametrize(
    "torn", [b'{"step": 300, "lo', b'{"step": 300, "\xff\xfe', b"\0\0\0", b"0", b"[1]", b"{}", b""]
)
def test_a_torn_line_costs_itself_alone(tmp_path, torn):
    whole = [json.dumps({"step": step, "validation/loss": 1.0}).encode() for step in (100, 200, 400, 500, 600)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*whole[:2], torn, *whole[2:]]) + b"\n")
    assert logs.is_logged(tmp_path, 500, "validation/")
    _log(tmp_path, start=500).close()
    assert _steps(tmp_path) == [100, 200, 400, 500]


def test_lines_for_which_there_is_no_room_are_written_with_the_next(tmp_path, caplog):
    class Full(type(tmp_path)):
        def open(self, *_, **__):
            with open(self, "ab") as file:
                file.write(b'{"step"')  # as far as there was room
            raise OSError(errno.ENOSPC, "No space left on device")

    log, metrics = _log(tmp_path), tmp_path / "metrics.jsonl"
    log.append({"step": 1})
    log.path = Full(metrics)
    log.append({"step": 2})
    assert _steps(tmp_path) == [1]
    (sentence,) = [record.getMessage() for record in caplog.records]
    assert sentence.startswith(f"the metrics cannot be written to {metrics} ([Errno 28] No space left on device)")
    assert "training goes on; if the disk is full, make room" in sentence
    log.append({"step": 3})
    log.path = metrics
    log.close()
    assert _steps(tmp_path) == [1, 2, 3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_events_for_which_there_is_no_room_are_written_with_the_next(tmp_path, monkeypatch, caplog):
    log = _log(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    log.append({"step": 1, "loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", full)
        log.append({"step": 2, "loss": 2.0})
        log.append({"step": 3, "loss": 3.0})
    sentence = f"TensorBoard's events cannot be written to {tmp_path} ([Errno 28] No space left on device)"
    assert caplog.text.count(sentence) == 2
    log.append({"step": 4, "loss": 4.0})
    log.close()
    assert _steps(tmp_path) == [1, 2, 3, 4]
    files = [EventAccumulator(str(file)).Reload() for file in tmp_path.glob("events.*")]
    shown = [event for file in files if "loss" in file.Tags()["scalars"] for event in file.Scalars("loss")]
    assert sorted((event.step, event.value) for event in shown) == [(step, step) for step in (1, 2, 3, 4)]


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 0.5), (False, 60.0)])
def test_the_progress_bar_seldom_writes_to_a_file(tmp_path, monkeypatch, terminal, seconds):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    log = _log(tmp_path)
    assert (log._bar.mininterval, log._bar.maxinterval >= seconds) == (seconds, True)
    log.close()


def test_the_progress_bar_writes_no_line_with_each_of_the_metrics(tmp_path, capsys):
    log = _log(tmp_path)
    before = capsys.readouterr().err.count("\r")
    for step in range(1, 50):
        log.advance()
        log.write(step, {"velocity/mse": 1.0})
    assert (before, capsys.readouterr().err.count("\r")) == (1, 0)
    log.close()
    assert "velocity=1" in capsys.readouterr().err  # the last is shown
