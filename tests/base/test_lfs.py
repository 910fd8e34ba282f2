"""Git LFS pointers are told from the files they stand for."""

import pytest

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.base.lfs import is_lfs_pointer, refuse_lfs_pointer
from megatron_hybrid.data.errors import DataError

OID = b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\n" + OID + b"size 12345\n"


@pytest.mark.parametrize(
    "content",
    [
        POINTER,
        POINTER.replace(b"\n", b"\r\n"),
        POINTER.replace(b"git-lfs", b"hawser"),  # the project's first name
        POINTER.replace(b"oid", b"ext-0-case sha256:00\noid"),
    ],
)
def test_pointers(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert is_lfs_pointer(content)
    with pytest.raises(UserError, match="/a: a Git LFS pointer.*git lfs pull"):
        refuse_lfs_pointer(tmp_path / "a")


@pytest.mark.parametrize(
    "content", [b"", b"version 1\n", POINTER[:30], b"\n" + POINTER, POINTER + b"and a text about pointers " * 40]
)
def test_other_files(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert not is_lfs_pointer(content)
    refuse_lfs_pointer(tmp_path / "a")


def test_the_error_is_the_callers(tmp_path):
    refuse_lfs_pointer(tmp_path / "missing")
    (tmp_path / "a").write_bytes(POINTER)
    with pytest.raises(DataError):
        refuse_lfs_pointer(tmp_path / "a", DataError)
