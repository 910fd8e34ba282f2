"""metrics.jsonl through resumes, crashes and late values."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_hybrid.observe.metrics import MetricsWriter, plain, read_metrics


def write(path, steps, start_step=0, **values):
    with MetricsWriter(path, start_step) as writer:
        for step in steps:
            writer.write({"step": step, "loss": 1 / step, **values})


def steps(path):
    return [record["step"] for record in read_metrics(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def test_a_line_a_step(path):
    write(path, [1, 2, 3])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 1 / 3}
    ]  # fmt: skip


@pytest.mark.parametrize("resume", [1, 4, 5, 9, 30])
def test_resuming_never_holds_a_step_twice(path, resume):
    write(path, range(1, 11))
    kept = path.read_text().splitlines(keepends=True)[:resume]
    write(path, range(resume + 1, 13), start_step=resume)
    assert steps(path) == [*range(1, min(resume, 10) + 1), *range(resume + 1, 13)]
    assert path.read_text().startswith("".join(kept)), "what is kept is kept to the byte"


def test_a_new_run_keeps_the_old_file_beside_its_own(path):
    write(path, [1, 2])
    write(path, [1])
    assert steps(path) == [1] and steps(path.with_name("metrics.jsonl.old")) == [1, 2]


def test_resuming_into_an_empty_folder(path):
    write(path, [8], start_step=7)
    assert steps(path) == [8]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4, "loss": 1', "{", "\x00\x00\x00", '{"x": 1}\n', "4"])
def test_a_torn_last_line_is_left_out_and_then_overwritten(path, torn):
    write(path, [1, 2, 3])
    with path.open("a") as file:
        file.write(torn)
    assert steps(path) == [1, 2, 3]
    write(path, [4, 5], start_step=3)
    assert steps(path) == [1, 2, 3, 4, 5]


def test_a_whole_last_line_that_lacks_its_end_is_kept(path):
    write(path, [1, 2, 3])
    path.write_text(path.read_text()[:-1])
    write(path, [4], start_step=3)
    assert steps(path) == [1, 2, 3, 4]


def test_damage_in_the_middle_is_an_error(path):
    path.parent.mkdir()
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        list(read_metrics(path))


@pytest.mark.parametrize(
    "damage",
    [b"\0" * 40 + b"\n", b"\xff\xfe\n", b"[1]\n", b'{"step": "2"}\n', b"[" * 10_000 + b"\n", b'{"step": 1}\n', b"\n"],
    ids=["zeros", "not UTF-8", "a list", "step is text", "nested too deep", "a second writer", "empty"],
)
def test_a_run_that_resumes_moves_damage_aside(path, damage):
    write(path, [1, 2, 3])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage, lines[2]]))
    with MetricsWriter(path, start_step=3) as writer:
        assert "moved 1 lines to metrics.jsonl.damaged" in writer.repaired
        writer.write({"step": 4})
    assert path.read_bytes() == b"".join(lines) + b'{"step": 4}\n'
    assert path.with_name("metrics.jsonl.damaged").read_bytes() == damage


def test_no_earlier_file_is_replaced(path):
    for number in range(3):
        write(path, [1], number=number)
    old = [path.with_name(name) for name in ("metrics.jsonl.old", "metrics.jsonl.old-2")]
    assert [next(read_metrics(file))["number"] for file in (*old, path)] == [0, 1, 2]


def test_values_of_the_same_step_join_its_line(path):
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "loss": 0.123456789})
        writer.write({"step": 1, "eval_loss": 2.5})
        writer.write({"step": 1, "loss": 1.0})  # shorter than before
        assert steps(path) == [1] == [writer.last_step]
        writer.write({"step": 2})
    assert path.read_text() == '{"step": 1, "loss": 1.0, "eval_loss": 2.5}\n{"step": 2}\n'
    with MetricsWriter(path, start_step=1) as writer:  # also after a resume
        writer.write({"step": 1, "more": 1})
    assert path.read_text() == '{"step": 1, "loss": 1.0, "eval_loss": 2.5, "more": 1}\n'


def test_steps_do_not_go_back(path):
    with MetricsWriter(path) as writer:
        writer.write({"step": 5})
        with pytest.raises(ValueError, match="step 4 cannot be logged after step 5"):
            writer.write({"step": 4})


def test_plain_values(path):
    values = [torch.tensor(0.5), np.float32(0.5), np.int64(3), float("nan"), float("inf"), True, "text", None]
    assert [plain(v) for v in values] == [0.5, 0.5, 3, None, None, True, "text", None]
    write(path, [1], bad=torch.tensor(float("nan")))
    assert "NaN" not in path.read_text()


def test_floats_keep_every_bit(path):
    rng = np.random.default_rng(0)
    values = [float(v) for v in rng.standard_normal(200) * 10.0 ** rng.integers(-300, 300, 200)]
    write(path, [1], values=values)
    assert next(read_metrics(path))["values"] == values


def test_a_killed_writer_loses_nothing_it_wrote(path):
    program = f"""
from megatron_hybrid.observe.metrics import MetricsWriter
writer = MetricsWriter({str(path)!r})
for step in range(1, 51):
    writer.write({{"step": step}})
print("written", flush=True)
input()
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"written\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert steps(path) == list(range(1, 51))
