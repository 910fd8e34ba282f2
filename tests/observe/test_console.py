"""The progress bar on a terminal, plain lines elsewhere, and the ETA."""

import io
import re

import pytest

from megatron_hybrid.observe.console import Eta, PlainConsole, ProgressConsole, describe, make_console

RECORD = {
    "step": 7, "loss": 2.34567, "grad_norm": 1.5, "lr": 3e-4, "tokens_per_s": 12345.6, "mfu": 0.312, "memory_gb": 1.25,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_describe():
    assert describe(RECORD) == "loss 2.3457  norm 1.5  12,346 tok/s  MFU 31%  lr 3.0e-04  1.25 GB"
    assert describe(RECORD | {"tflops": 308.66}, 80) == f"{describe(RECORD)}  309 TFLOP/s"
    assert describe(RECORD, 40) == "loss 2.3457  norm 1.5  12,346 tok/s", "what does not fit is left out, from the end"
    assert describe({"step": 1, "loss": None}) == ""


@pytest.mark.parametrize("total", [20, 1_000_000])
def test_lines_have_at_most_80_columns(total):
    stream = io.StringIO()
    console = PlainConsole(total, total - 10, stream, every=1)
    large = {
        "loss": 12.34567,
        "grad_norm": 123456.7,
        "lr": 3e-4,
        "tokens_per_s": 123_456_789.0,
        "mfu": 0.5,
        "memory_gb": 139.0,
    }
    for step in range(total - 9, total + 1):
        console.step(step, large)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10 and all(len(line) <= 80 and "loss 12.3457" in line and "ETA" in line for line in lines)


def test_eta():
    now = [0.0]
    eta = Eta(100, lambda: now[0])
    assert eta(40) == "-:--:--"
    now[0] += 2
    assert eta(41) == "0:01:58"
    now[0] += 4
    assert eta(42) == "0:02:54"  # 3 s a step
    assert eta(100) == "0:00:00"


def test_plain_lines():
    stream = io.StringIO()
    console = make_console(25, start_step=3, stream=stream, every=10)
    assert isinstance(console, PlainConsole)
    for step in range(4, 26):
        skipped = {"skipped": True, "skip_reason": "loss is nan"} if step == 13 else {}
        console.step(step, RECORD | skipped)
    console.close()
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"step {s}/25" for s in (4, 10, 13, 20, 25)]
    assert lines[0].endswith("ETA -:--:--") and lines[2].endswith("SKIPPED: loss is nan")


def test_slow_steps_are_not_silent():
    stream = io.StringIO()
    console = PlainConsole(1000, 0, stream, every=100, patience=0.0)
    for step in range(1, 4):
        console.step(step, RECORD)
    assert len(stream.getvalue().splitlines()) == 3


def test_a_terminal_of_80_columns(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    console = make_console(20, stream=stream)
    console.step(20, RECORD)
    console.close()
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).splitlines()[-1].split("\r")[-1]
    assert len(last) <= 80 and "loss 2.3457" in last and "12,346 tok/s" in last and "ETA" in last and "…" not in last


def test_progress_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    console = make_console(20, stream=stream)
    assert isinstance(console, ProgressConsole)
    for step in range(1, 21):
        console.step(step, RECORD)
    console.info("saved [checkpoint] 20")
    console.step(20, RECORD | {"skipped": True, "skip_reason": "loss is inf"})
    console.close()
    text = stream.getvalue()
    assert "step 20/20" in text and "loss 2.3457" in text and "MFU 31%" in text and "ETA" in text
    assert "saved [checkpoint] 20" in text and "SKIPPED: loss is inf" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor comes back"
