"""The progress bar on a terminal, plain lines elsewhere, and the ETA."""

import io

from megatron_hybrid.observe.console import Eta, PlainConsole, ProgressConsole, describe, make_console

RECORD = {
    "step": 7, "loss": 2.34567, "grad_norm": 1.5, "lr": 3e-4, "tokens_per_s": 12345.6, "mfu": 0.312, "memory_gb": 1.25,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_describe():
    assert describe(RECORD) == "loss 2.3457  grad norm 1.500  lr 3.00e-04  12,346 tok/s  MFU 31.2%  1.2 GB"
    assert describe({"step": 1, "loss": None}) == ""


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
    assert "step 20/20" in text and "loss 2.3457" in text and "MFU 31.2%" in text and "ETA" in text
    assert "saved [checkpoint] 20" in text and "SKIPPED: loss is inf" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor comes back"
