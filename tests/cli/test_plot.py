"""`megatron-hybrid plot`: images of one run and of several, and runs that cannot be drawn."""

import json
import sys

import pytest

from megatron_hybrid.cli.plot import main

PNG = b"\x89PNG"


@pytest.fixture
def run(tmp_path):
    """`run(name)`: a folder with the metrics of ten steps."""

    def make(name: str, steps: int = 10):
        folder = tmp_path / name
        folder.mkdir()
        records = [{"step": n, "loss": 5.0 / n, "lr": 1e-3, "tokens": 64 * n} for n in range(1, steps + 1)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
        return folder

    return make


def plot(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["megatron-hybrid plot", *map(str, words)])
    return main()


def test_one_run_is_drawn_into_its_folder(run, monkeypatch, capsys):
    folder = run("a")
    assert plot(monkeypatch, folder) == 0
    assert (folder / "loss.png").read_bytes().startswith(PNG) and str(folder / "loss.png") in capsys.readouterr().out


def test_several_runs_are_compared(run, monkeypatch, tmp_path):
    image = tmp_path / "both.png"
    assert plot(monkeypatch, run("a"), run("b") / "metrics.jsonl", "--out", image) == 0
    assert image.read_bytes().startswith(PNG)


def test_what_cannot_be_drawn_ends_with_78(run, monkeypatch, capsys, tmp_path):
    a, empty, damaged = run("a"), run("empty", steps=0), run("damaged")
    (damaged / "metrics.jsonl").write_text('nothing\n{"step": 1, "loss": 2.0}\n')
    for words, message in [
        ((a, a), "--out: 2 runs are drawn into one image"),
        ((tmp_path / "none",), "does not exist"),
        ((empty,), "no training step yet"),
        ((damaged,), "resuming the run repairs it"),
        ((a, "--out", tmp_path / "no" / "folder.png"), "--out"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            plot(monkeypatch, *words)
        assert stopped.value.code == 78 and message in capsys.readouterr().err
