"""The files of a run, looked at before it is queued, and folders that a run cannot have."""

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.checkpoint.format import INDEX, Index
from megatron_hybrid.config import run_dir
from megatron_hybrid.config.load import load_run
from megatron_hybrid.config.run_dir import RunDirError, check_run_dir, checkpoint_bytes
from megatron_hybrid.evaluation.stdlib_tasks import write_stdlib_tasks
from megatron_hybrid.train.dry_run import check_files

TINY = "examples/configs/pretrain_hybrid_tiny.yaml"


@pytest.fixture
def run(tmp_path):
    """`run(*overrides)`: a run whose files are all there."""
    np.arange(2000, dtype=np.uint16).__mod__(257).astype(np.uint16).tofile(tmp_path / "tokens.npy")
    names = ("train", "validation.code", "validation.docs")
    data = ["tasks.paths=[]", *(f"data.{name}.0.path={tmp_path}/tokens.npy" for name in names)]
    return lambda *overrides: load_run(TINY, [*data, f"run_dir={tmp_path}/run", *overrides])


def checkpoint(folder: Path, model) -> Path:
    folder.mkdir(parents=True)
    (folder / INDEX).write_text(Index(model.model_dump(mode="json"), {}, {}).dump())
    return folder


def test_all_is_well_and_nothing_is_made(run, tmp_path):
    assert check_files(run(), 4, required=True) == []
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.npy"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.train.0.path=/no/such.npy", "data.train.0.path: /no/such.npy: no such file"),
        (
            "data.validation.code.0.path=/no/such/prefix",
            "data.validation.code.0.path: /no/such/prefix.idx and /no/such/prefix.bin: no such",
        ),
        ("data.train.0.path=/no/such/*.npy", "data.train.0.path: /no/such/*.npy: no such file: nothing matches"),
        ("checkpoint.resume=/no/such/run", "checkpoint.resume: /no/such/run: there is no such folder"),
    ],
)
def test_what_is_not_on_this_machine_is_said_or_refused(run, override, says):
    (line,) = check_files(run(override), 4, required=False)
    assert line.startswith(says)
    with pytest.raises(ConfigError) as refused:
        check_files(run(override), 4, required=True)
    assert str(refused.value).startswith(says)


def test_training_does_without_the_tokenizer(run):
    assert "data.tokenizer: /no: there is no such folder" in check_files(run("data.tokenizer=/no"), 4, required=True)[0]


def test_files_that_are_there_and_wrong_are_errors_wherever(run, tmp_path):
    (tmp_path / "odd.npy").write_bytes(b"abc")
    (tmp_path / "short.npy").write_bytes(b"abcd")
    (tmp_path / "half.bin").write_bytes(b"ab")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling.npy").symlink_to(tmp_path / "nowhere")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / INDEX).write_text("{")
    other = checkpoint(tmp_path / "other", run("model.layer_pattern=GA").model)
    wrong = {
        "data.train.0.path": [(f"{tmp_path}/{name}", says) for name, says in (
            ("odd.npy", "truncated at byte 3"), ("short.npy", "2 tokens do not make one sample"), ("half", "half.idx: no such file"),
            ("dangling.npy", "cannot be read"), ("empty", "no such file"))],
        "checkpoint.resume": [(tmp_path / "empty", "no complete checkpoint there"), (tmp_path / "damaged", "damaged"),
                            (other, "model.layer_pattern is 'GA' there")],
        "run_dir": [(tmp_path / "odd.npy", "is a file"), ("/proc/run", "cannot be made or written")],
    }  # fmt: skip
    for field, cases in wrong.items():
        for value, says in cases:
            with pytest.raises(ConfigError) as refused:
                check_files(run(f"{field}={value}"), 4, required=False)
            assert any(name == field and says in message for name, message in refused.value.problems), refused.value


@pytest.mark.parametrize("mode", ["mask", "pack"])
def test_documents_need_boundaries(run, tmp_path, mode):
    config = run("model.eos_token_id=null")
    without = config.model_copy(update={"data": config.data.model_copy(update={"documents": mode})})
    with pytest.raises(ConfigError, match="data.train.0.path: .*tokens.npy: its document boundaries are unknown"):
        check_files(without, 4, required=True)
    with_eos = without.model_copy(update={"model": run().model})
    assert check_files(with_eos, 4, required=True) == []


def test_every_problem_is_told_at_once(run):
    overrides = [
        "data.train.0.path=/no/a.npy",
        "data.validation.code.0.path=/no/b.npy",
        "checkpoint.resume=/no/c",
        "run_dir=/proc/run",
    ]
    with pytest.raises(ConfigError) as refused:
        check_files(run(*overrides), 4, required=True)
    names = ["run_dir", "data.train.0.path", "data.validation.code.0.path", "checkpoint.resume"]
    assert [field for field, _ in refused.value.problems] == names


def test_the_checkpoint_that_would_be_resumed_is_of_this_model(run, tmp_path):
    checkpoint(tmp_path / "run" / "checkpoints" / "step-00000003", run("model.layer_pattern=GA").model)
    with pytest.raises(ConfigError, match="checkpoint.resume: .*step-00000003: model.layer_pattern is 'GA' there"):
        check_files(run(), 4, required=False)


def test_tasks_are_read(run, tmp_path):
    write_stdlib_tasks(tmp_path / "tasks")
    choices, text = (f"tasks.paths=[{tmp_path}/tasks/{name}.yaml]" for name in ("http_status", "next_month"))
    assert check_files(run(choices), 4, required=True) == []
    with pytest.raises(ConfigError, match="generate text do not run with parallel.pipeline_parallel_size = 2"):
        check_files(run(text), 4, required=False)
    assert check_files(run(text, "parallel={}"), 4, required=True) == []
    (line,) = check_files(run("tasks.paths=[/no/task]"), 4, required=False)
    assert line.startswith("tasks.paths.0: /no/task: no such file or folder")
    (tmp_path / "tasks" / "http_status.jsonl").unlink()
    with pytest.raises(ConfigError, match="tasks.paths.0: .*http_status.jsonl: cannot be read"):
        check_files(run(choices), 4, required=False)


def test_no_torch_and_no_token(root, run, tmp_path):
    write_stdlib_tasks(tmp_path / "tasks")
    code = f"""
import sys
from megatron_hybrid.config.load import load_run
from megatron_hybrid.data.sources import Shard
from megatron_hybrid.train.dry_run import check_files
Shard.map = None
data = [f"data.{{name}}.0.path={tmp_path}/tokens.npy" for name in ("train", "validation.code", "validation.docs")]
task = "tasks.paths=[{tmp_path}/tasks/http_status.yaml]"
assert check_files(load_run({TINY!r}, [*data, task, "run_dir={tmp_path}/run"]), 4, True) == []
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("where", ["file", "file/run", "link", "/proc/run", "/dev/null/run", "n" * 300, "locked/run"])
def test_folders_that_a_run_cannot_have(run, tmp_path, where, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    if where == "locked/run" and os.access(tmp_path / "locked", os.W_OK):  # root may write everywhere
        monkeypatch.setattr(run_dir.tempfile, "TemporaryDirectory", deny)
    with pytest.raises(RunDirError, match="run_dir: .* cannot be made or written: .*; set it to another folder"):
        check_run_dir(run(f"run_dir={tmp_path / where}"))


def deny(**_):
    raise PermissionError(13, "Permission denied")


def test_a_disk_without_room_for_a_checkpoint(run, monkeypatch):
    config = run()
    usage = namedtuple("usage", "total used free")(2**40, 0, checkpoint_bytes(config) - 1)
    monkeypatch.setattr(run_dir.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunDirError, match="run_dir: .* MiB free, and a checkpoint takes .* MiB; make room"):
        check_run_dir(config, world_size=1)
    check_run_dir(config, world_size=2)  # then the preflight looks, on every node


def test_checkpoints_are_as_large_as_said(run):
    from megatron_hybrid.arch.flops import count_parameters

    assert checkpoint_bytes(run()) == 12 * count_parameters(run().model)
    assert checkpoint_bytes(run("train.dtype=bf16")) == 14 * count_parameters(run().model)
