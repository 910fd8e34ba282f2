"""Failures of the log's outputs: reported once, tried again, nothing lost that can be kept."""

import errno
import io
import os
import shutil

import pytest

from megatron_hybrid.base.output import TolerantStream
from megatron_hybrid.config.logging import LoggingConfig
from megatron_hybrid.observe import RunLogger
from megatron_hybrid.observe.metrics import MetricsWriter, read_metrics
from megatron_hybrid.observe.outputs import Output, RetriedSink


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_lines_wait_until_they_can_be_written(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", no_space)
            for record in ({"step": 2}, {"step": 2, "eval_loss": 3.0}, {"step": 3}):
                with pytest.raises(OSError, match="No space left"):
                    writer.write(record)
        writer.write({"step": 4})
        writer.write({"step": 4, "more": 1})
    assert list(read_metrics(path)) == [{"step": 1}, {"step": 2, "eval_loss": 3.0}, {"step": 3}, {"step": 4, "more": 1}]


def test_a_line_of_which_half_is_written_is_written_again(tmp_path, monkeypatch):
    path, pwrite = tmp_path / "metrics.jsonl", os.pwrite
    with MetricsWriter(path) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: len(data) // 2], at))
            with pytest.raises(OSError, match="not be written completely"):
                writer.write({"step": 1})
        writer.write({"step": 2})
    assert list(read_metrics(path)) == [{"step": 1}, {"step": 2}]


def test_a_removed_folder_is_created_again(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1})
        shutil.rmtree(path.parent)
        with pytest.raises(OSError, match="it was removed"):
            writer.write({"step": 2})
        writer.write({"step": 3})
    assert list(read_metrics(path)) == [{"step": 2}, {"step": 3}]


def test_a_failure_is_reported_once_and_so_is_its_end():
    said: list[str] = []
    output = Output("loss.png", said.append)
    assert [output.attempt(no_space), output.attempt(no_space), output.attempt(list)] == [False, False, True]
    assert said == [
        "loss.png cannot be written: OSError: No space left on device; the run continues and tries again",
        "loss.png is written again, after 2 failures",
    ]


def test_a_broken_sink_is_replaced_after_a_while(monkeypatch):
    now, said, made = [0.0], [], []
    monkeypatch.setattr("megatron_hybrid.observe.outputs.time.monotonic", lambda: now[0])

    class Sink:
        def __init__(self, step: int, again: bool) -> None:
            self.logged, self.broken = [], not again
            made.append((step, again, self))

        def log(self, step, scalars):
            if self.broken:
                no_space()
            self.logged.append(step)

        def close(self):
            no_space()

    sink = RetriedSink("TensorBoard", Sink, 0, said.append)
    for step in (1, 2, 3):
        sink.log(step, {})  # the second and third are too early
    now[0] = 10.0
    sink.log(4, {})
    assert [(step, again) for step, again, _ in made] == [(1, False), (4, True)] and made[1][2].logged == [4]
    assert len(said) == 2 and "TensorBoard cannot be written" in said[0] and "written again" in said[1]


def test_a_logger_outlives_its_outputs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("megatron_hybrid.observe.run_logger.draw", no_space)
    with RunLogger(LoggingConfig(tensorboard=False, plot_interval=2), tmp_path, 0, total_steps=6) as logger:
        for step in range(1, 7):
            logger.log_step(step, {"loss": 1.0})
    assert len(list(read_metrics(tmp_path / "metrics.jsonl"))) == 6
    assert capsys.readouterr().out.count("loss.png cannot be written") == 1


def test_a_closed_console_is_reported_once():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    reports = io.StringIO()
    stream = TolerantStream(Closed(), "stdout", reports)
    for _ in range(3):
        print("text", file=stream, flush=True)
    assert reports.getvalue() == "stdout cannot be written: Broken pipe; the run continues\n"
