"""Preprocessing replaces datasets of its own, as a whole, and nothing else; two jobs exclude each other."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hybrid.base.process import start_time
from megatron_hybrid.data import preprocess as module
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.preprocess import preprocess
from megatron_hybrid.data.work_folder import WorkFolder
from tests.data.test_preprocess import decoded

SPLIT = {"train": 0.5, "validation": 0.5}


def write_lines(file, *texts):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def content(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def linked(file):
    (file.parent / "link.json").symlink_to(file.name)
    return file.parent / "link.json"


def hard_linked(file):
    os.link(file, file.parent / "other.jsonl")
    return file.parent / "other.jsonl"


NAMES = {
    "itself": lambda file: file,
    "through ..": lambda file: file.parent / "sub" / ".." / file.name,
    "a link": linked,
    "a hard link": hard_linked,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("file", "split"), [("c.json", None), ("c_train.json", SPLIT), ("c.bin", None)])
def test_an_input_is_never_replaced(tmp_path, name, file, split):
    (tmp_path / "sub").mkdir()
    source = NAMES[name](write_lines(tmp_path / file, "alpha", "beta"))
    before = content(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(DataError, match="is an input and would be an output: give another output prefix"):
            preprocess([source], tmp_path / "c", split=split, overwrite=overwrite)
    with pytest.raises(DataError, match="is an input"):
        preprocess([tmp_path], tmp_path / "c", include=["c*"], split=split, overwrite=True)
    assert content(tmp_path) == before


def test_an_output_that_links_to_an_input_is_kept(tmp_path):
    source = write_lines(tmp_path / "in" / "a.jsonl", "alpha")
    (tmp_path / "c.idx").symlink_to(source)
    with pytest.raises(DataError, match="c.idx is an input"):
        preprocess([source], tmp_path / "c", overwrite=True)
    with pytest.raises(DataError, match="c.idx exists and is not replaced, with or without --overwrite: it is a link"):
        preprocess([write_lines(tmp_path / "b.jsonl", "beta")], tmp_path / "c", overwrite=True)
    assert (tmp_path / "c.idx").is_symlink() and source.stat().st_size > 0


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("c.json", b'{"text": "a corpus"}\n', "c.json is not a summary"),
        ("c.json", b'{\n  "documents": [\n    "a"\n  ]\n}', "c.json is not a summary"),
        ("c.bin", b"weights", "there is no .*c.json"),
        ("c.idx", b"MMIDIDX\0\0", "there is no .*c.json"),
        ("c_validation.bin", b"weights", "there is no .*c_validation.json"),
        ("c.partial", b"a download", "c.partial exists and is not a work folder"),
        ("c.partial/notes", b"mine", "c.partial holds notes"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_kept(tmp_path, name, data, reason, overwrite):
    source = write_lines(tmp_path / "in" / "a.jsonl", *"abcdefgh")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(data)
    before = content(tmp_path)
    with pytest.raises(DataError, match=reason):
        preprocess([source], tmp_path / "c", split=SPLIT if "_" in name else None, overwrite=overwrite)
    assert content(tmp_path) == before


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_put_among_ours_is_kept(tmp_path, suffix):
    source = write_lines(tmp_path / "in" / "a.jsonl", "alpha")
    preprocess([source], tmp_path / "c")
    (tmp_path / f"c{suffix}").write_bytes(b"weights")
    with pytest.raises(DataError, match=f"c{suffix} (does not have the|is not the index)"):
        preprocess([source], tmp_path / "c", overwrite=True)
    assert (tmp_path / f"c{suffix}").read_bytes() == b"weights"


@pytest.mark.parametrize("missing", [[], [".bin"], [".idx"], [".bin", ".idx"]])
def test_own_datasets_can_be_replaced(tmp_path, missing):
    preprocess([write_lines(tmp_path / "a.jsonl", "alpha")], tmp_path / "c")
    for suffix in missing:
        (tmp_path / f"c{suffix}").unlink()
    preprocess([write_lines(tmp_path / "b.jsonl", "beta")], tmp_path / "c", overwrite=True)
    assert decoded(tmp_path / "c") == ["beta"]
    assert {file.name for file in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl", "c.bin", "c.idx", "c.json"}


@pytest.mark.parametrize("prefix", ["out/", ".", "a/.."])
def test_a_prefix_is_no_folder(tmp_path, prefix):
    with pytest.raises(DataError, match="is a folder: add the name of the dataset"):
        preprocess([write_lines(tmp_path / "a.jsonl", "alpha")], f"{tmp_path}/{prefix}")


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", range(12))
def test_a_replacement_that_fails_anywhere_is_undone(tmp_path, monkeypatch, failing, error):
    preprocess([write_lines(tmp_path / "in" / "a.jsonl", *"abcdefgh")], tmp_path / "c", split=SPLIT)
    before = content(tmp_path)
    source = write_lines(tmp_path / "in" / "b.jsonl", *"ABCDEFGH")
    renames, replace = [], Path.replace

    def fail_once(self, target):
        renames.append(target)
        if len(renames) == failing + 1:
            raise error
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_once)
    with pytest.raises(type(error)):
        preprocess([source], tmp_path / "c", split=SPLIT, overwrite=True)
    monkeypatch.undo()
    source.unlink()
    assert content(tmp_path) == before and not list(tmp_path.glob("*.partial*"))


def kill_at_rename(number, source, prefix):
    """Run a job in a child process that is killed at its nth rename."""
    child = os.fork()
    if child == 0:
        renames, replace = [], Path.replace

        def kill(self, target):
            renames.append(target)
            if len(renames) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        Path.replace = kill
        preprocess([source], prefix, overwrite=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("number", range(1, 7))
def test_a_killed_replacement_is_completed_by_the_next_job(tmp_path, number):
    preprocess([write_lines(tmp_path / "in" / "a.jsonl", "alpha")], tmp_path / "c")
    kill_at_rename(number, write_lines(tmp_path / "in" / "b.jsonl", "beta"), tmp_path / "c")
    last = write_lines(tmp_path / "in" / "d.jsonl", "delta")
    said, completed = [], []
    with pytest.raises(DataError, match=r"c\.\w+ exists: give another output prefix, or --overwrite"):
        preprocess([last], tmp_path / "c", say=said.append)
    read = lambda *_: completed.append(decoded(tmp_path / "c"))  # noqa: E731
    preprocess([last], tmp_path / "c", overwrite=True, say=said.append, progress=read)
    assert sum("completed the replacement that process" in sentence for sentence in said) == 1
    assert completed == [["beta"]]
    assert decoded(tmp_path / "c") == ["delta"] and not list(tmp_path.glob("*.partial*"))


def start_of_dead_process():
    """A process number of this host that is free, and the start of the process that had it."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_time(process.pid)
    process.communicate()
    return process.pid, started


def leave_folder(prefix, **changes):
    """The work folder of a job of this host, with changes to its owner."""
    folder = WorkFolder(str(prefix), lambda folder: None, lambda sentence: None)
    folder._owner.update(changes)
    folder.path.mkdir()
    (folder.path / "dataset.bin").write_bytes(b"half a dataset")
    (folder.path / "owner.json").write_text(json.dumps(folder._owner))


def test_the_folder_of_a_dead_process_is_taken_over(tmp_path):
    pid, started = start_of_dead_process()
    leave_folder(tmp_path / "c", pid=pid, started=started)
    said = []
    preprocess([write_lines(tmp_path / "a.jsonl", "alpha")], tmp_path / "c", say=said.append)
    assert decoded(tmp_path / "c") == ["alpha"] and not list(tmp_path.glob("*.partial*"))
    assert len(said) == 1 and f"took over from process {pid} on host" in said[0]


@pytest.mark.parametrize(
    "changes", [{"started": "1"}, {"owner": None}], ids=["its number was given again", "without an owner"]
)
def test_an_abandoned_folder_is_taken_over(tmp_path, changes):
    leave_folder(tmp_path / "c", **changes)
    if "owner" in changes:
        (tmp_path / "c.partial" / "owner.json").unlink()
    preprocess([write_lines(tmp_path / "a.jsonl", "alpha")], tmp_path / "c")
    assert decoded(tmp_path / "c") == ["alpha"] and not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize(
    "changes",
    [{}, {"host": "elsewhere"}, {"boot": "another"}, {"pid_namespace": "another"}],
    ids=["alive", "another host", "another machine of the same name", "another container"],
)
def test_the_folder_of_a_process_that_may_live_is_kept(tmp_path, changes):
    if changes:
        pid, started = start_of_dead_process()
        changes |= {"pid": pid, "started": started}
    leave_folder(tmp_path / "c", **changes)
    before = content(tmp_path)
    source = write_lines(tmp_path / "in" / "a.jsonl", *"abcdefgh")
    host = changes.get("host", os.uname().nodename)
    with pytest.raises(DataError, match=rf"process \d+ on host {host}.*rm -r .*c.partial"):
        preprocess([source], tmp_path / "c", overwrite=True)
    shutil.rmtree(tmp_path / "in")
    assert content(tmp_path) == before


def test_a_folder_whose_owner_cannot_be_read_is_kept(tmp_path):
    leave_folder(tmp_path / "c", **dict(zip(("pid", "started"), start_of_dead_process(), strict=True)))
    (tmp_path / "c.partial" / "owner.json").unlink()
    (tmp_path / "c.partial" / "owner.json").mkdir()
    source = write_lines(tmp_path / "a.jsonl", "alpha")
    with pytest.raises(DataError, match=r"an unknown process \(.*owner.json: Is a directory\).*rm -r .*c.partial"):
        preprocess([source], tmp_path / "c", overwrite=True)
    assert (tmp_path / "c.partial" / "dataset.bin").read_bytes() == b"half a dataset"


@pytest.mark.parametrize("split", [None, SPLIT])
def test_two_jobs_to_one_dataset_exclude_each_other(tmp_path, monkeypatch, split):
    """The other job has the name that this one's --split gives, or the same name by another path."""
    first, second = write_lines(tmp_path / "a.jsonl", "alpha"), write_lines(tmp_path / "b.jsonl", *"abcdefgh")
    (tmp_path / "link").symlink_to(tmp_path)
    other = tmp_path / "link" / "c" if split is None else tmp_path / "c"
    mine = tmp_path / ("c" if split is None else "c_validation")
    publish, refused = module.Outputs.publish, []

    def publish_later(self):
        monkeypatch.undo()
        with pytest.raises(DataError, match="is being written by process") as error:
            preprocess([second], other, split=split, overwrite=True)
        refused.append(error)
        publish(self)

    monkeypatch.setattr(module.Outputs, "publish", publish_later)
    preprocess([first], mine)
    assert len(refused) == 1 and decoded(mine) == ["alpha"]
    names = {"a.jsonl", "b.jsonl", "link", *(f"{mine.name}{suffix}" for suffix in (".bin", ".idx", ".json"))}
    assert {file.name for file in tmp_path.iterdir()} == names


def test_a_file_that_appears_during_the_job_is_kept(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", "alpha")
    with pytest.raises(DataError, match="c.json exists and is not replaced"):
        preprocess([source], tmp_path / "c", progress=lambda *_: (tmp_path / "c.json").write_text("mine"))
    assert (tmp_path / "c.json").read_text() == "mine"
    assert {file.name for file in tmp_path.iterdir()} == {"a.jsonl", "c.json"}


def test_sigterm_leaves_the_old_dataset(tmp_path, root):
    source = write_lines(tmp_path / "a.jsonl", "alpha")
    preprocess([source], tmp_path / "c")
    before = content(tmp_path)
    script = (
        "import os, signal, sys; sys.argv[0] = 'preprocess_data'\n"
        "from megatron_hybrid.data import preprocess as m; from tools import preprocess_data as t\n"
        "m.Outputs.publish = lambda self: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.exit(t.main([{str(source)!r}, '--output', {str(tmp_path / 'c')!r}, '--overwrite', '--workers', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.returncode == 130 and "interrupted: nothing written" in done.stderr
    assert content(tmp_path) == before
