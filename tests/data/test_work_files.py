"""Results that the processes of a run share: complete or absent, and errors that name the file."""

import numpy as np
import pytest

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.work_files import WorkFiles, digest, file_state


def test_a_result_is_complete_when_its_facts_are_there(tmp_path):
    files = WorkFiles(tmp_path / "run" / "documents")
    assert files.facts("a") is None
    files.write("a", {"bounds": np.arange(5), "more": np.zeros(2)}, {"documents": 4})
    assert files.facts("a") == files.required("a") == {"documents": 4}
    assert files.array("a", "bounds")[:].tolist() == [0, 1, 2, 3, 4]
    (files.folder / "a.json").write_text('{"documents"')
    assert files.facts("a") is None
    with pytest.raises(DataError, match=r"a.json is missing or damaged: .*that all nodes share"):
        files.required("a")


def test_an_array_that_cannot_be_read(tmp_path):
    files = WorkFiles(tmp_path)
    files.write("a", {"bounds": np.arange(5)}, {})
    (tmp_path / "a.bounds.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(
        DataError, match=rf"a.bounds.npy: cannot be read: .*remove {tmp_path} to compute its files again"
    ):
        files.array("a", "bounds")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written: .*; the run needs a folder it can write"):
        WorkFiles(tmp_path / "file" / "documents").write("a", {}, {})


def test_names_follow_from_the_state_of_files(tmp_path):
    path = tmp_path / "a"
    path.write_text("1")
    before = digest(file_state(str(path)), 3)
    assert before == digest(file_state(str(path)), 3) != digest(file_state(str(path)), 4)
    path.write_text("12")
    assert digest(file_state(str(path)), 3) != before
    with pytest.raises(DataError, match="gone: cannot be read"):
        file_state(str(tmp_path / "gone"))
