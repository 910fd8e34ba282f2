"""Folders: links, loops, unreadable folders and patterns; nothing is lost silently."""

import os

import pytest

from megatron_hybrid.data.documents import find_files
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.records import ReadOptions, Skipped
from megatron_hybrid.data.walk import _Walk


@pytest.fixture
def tree(tmp_path):
    for name in ["top/a.py", "top/sub/b.py", "top/.hidden/c.py", "top/sub/.d.py", "elsewhere/e.py", "elsewhere/f.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path / "top"


REAL = [".hidden/c.py", "a.py", "sub/.d.py", "sub/b.py"]


def found(top, include=("*.py",), exclude=(), options=ReadOptions()):  # noqa: B008 (frozen)
    skipped = Skipped()
    files = find_files([top], include, exclude, options=options, skipped=skipped)
    assert not skipped.documents
    return [os.path.relpath(file.path, top) for file in files], dict(skipped.files)


def test_hidden_files_are_like_any_others(tree):
    assert found(tree) == (REAL, {})
    assert found(tree, exclude=[".*"]) == (["a.py", "sub/b.py"], {})


def test_links_out_of_the_folder_are_followed(tree):
    (tree / "folder").symlink_to(tree.parent / "elsewhere")
    (tree / "z.py").symlink_to(tree.parent / "elsewhere" / "f.txt")
    assert found(tree) == ([".hidden/c.py", "a.py", "folder/e.py", "sub/.d.py", "sub/b.py", "z.py"], {})


def test_each_file_is_taken_once(tree):
    (tree / "0.py").symlink_to("a.py")
    (tree / "0").symlink_to("sub")
    (tree / "1").symlink_to(tree.parent / "elsewhere")
    (tree / "2").symlink_to("1")
    files, skipped = found(tree)
    assert files == [".hidden/c.py", "1/e.py", "a.py", "sub/.d.py", "sub/b.py"]
    assert skipped == {"link_to_file_already_taken": 1, "link_to_folder_already_read": 2}
    os.link(tree / "a.py", tree / "hard.py")  # a hard link is a file of its own
    assert "hard.py" in found(tree)[0]


@pytest.mark.parametrize("target", [".", "..", "loop", "sub/back"])
def test_loops_end(tree, target):
    (tree / "sub" / "back").symlink_to("..")
    (tree / "loop").symlink_to(target)
    files, skipped = found(tree)
    assert set(REAL) <= set(files) and len(files) == len(REAL) + (target == "..")  # the folder above has one more
    assert sum(skipped.values()) >= 2


def test_a_selected_link_to_a_missing_file(tree):
    (tree / "gone.py").symlink_to("nothing")
    with pytest.raises(DataError, match="gone.py: a link to a file that is missing.*--bad-records skip"):
        found(tree)
    assert found(tree, options=ReadOptions(bad_records="skip")) == (REAL, {"dangling_link": 1})
    assert found(tree, exclude=["gone*"]) == (REAL, {})


def test_another_link_to_a_missing_target_may_be_a_folder(tree):
    (tree / "disk").symlink_to("nothing")
    assert found(tree) == (REAL, {"dangling_link": 1})


def test_unreadable_folders(tree, monkeypatch):
    scandir = os.scandir

    def deny(path):  # chmod does not stop root
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(DataError, match="sub: cannot be read: Permission denied.*--bad-records skip"):
        found(tree)
    skip = ReadOptions(bad_records="skip")
    assert found(tree, options=skip) == ([".hidden/c.py", "a.py"], {"unreadable_folder": 1})
    assert found(tree, exclude=["sub/*"]) == ([".hidden/c.py", "a.py"], {})


def test_special_files_are_counted(tree):
    os.mkfifo(tree / "pipe.py")
    assert found(tree) == (REAL, {"special_file": 1})


def test_names_in_another_case_are_counted(tree):
    (tree / "A.PY").write_text("")
    assert found(tree) == (REAL, {"name_in_other_case": 1})
    assert found(tree, include=["*.py", "*.PY"]) == (["A.PY"] + REAL if "A.PY" < ".h" else sorted([*REAL, "A.PY"]), {})
    with pytest.raises(DataError, match=r"no file matches \*.Py .5 would match in another case."):
        found(tree, include=["*.Py"])


def test_patterns_that_match_nothing(tree):
    with pytest.raises(DataError, match=r"--include \*.rs: matches no file"):
        found(tree, include=["*.py", "*.rs"])
    for how in ({"include": ["*.py"]}, {"exclude": ["*.py"]}):
        with pytest.raises(DataError, match="--include and --exclude choose files of folders"):
            find_files([tree / "a.py"], **how)
    files = find_files([tree, tree.parent / "elsewhere"], ["*.py", "f.*"][:1])
    assert len(files) == len(REAL) + 1


def test_a_folder_excluded_as_a_whole_is_not_read(tree, monkeypatch):
    read, entries = [], _Walk._entries
    monkeypatch.setattr(_Walk, "_entries", lambda self, path: read.append(path) or entries(self, path))
    assert found(tree, exclude=["sub/*"])[0] == [".hidden/c.py", "a.py"]
    assert "sub" not in read
