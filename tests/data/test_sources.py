"""Token streams: shards end to end, raw and with NumPy's header."""

import numpy as np
import pytest

from megatron_hybrid.config.data import SourceConfig
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.sources import open_source
from tests.data.files import write_indexed, write_raw


def read_all(vocab_size: int = 1000, **config) -> list[int]:
    source = open_source(SourceConfig(**config), vocab_size)
    return source.read(0, source.num_tokens).tolist()


@pytest.mark.parametrize(
    ("dtype", "vocab_size"),
    [("uint16", 1000), ("uint16", 65536), ("uint32", 65537), ("uint32", 100352)],
)
def test_raw_shards_have_the_smallest_type_that_holds_the_vocabulary(tmp_path, dtype, vocab_size):
    tokens = [0, 1, vocab_size - 1]
    assert read_all(vocab_size, path=write_raw(tmp_path / "a.npy", tokens, dtype)) == tokens


def test_a_given_type_wins(tmp_path):
    assert read_all(path=write_raw(tmp_path / "a.npy", [1, 2, 3], "uint32"), dtype="uint32") == [1, 2, 3]


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64", ">u4", "uint8"])
def test_a_numpy_header_is_honoured(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.array([1, 2, 200], dtype))
    assert read_all(path=str(tmp_path / "a.npy")) == [1, 2, 200]


def test_globs_are_sorted_and_read_across_shards(tmp_path):
    tokens = np.arange(100)
    for name, part in [("b/2.npy", tokens[70:]), ("a/1.npy", tokens[:1]), ("b/1.npy", tokens[1:70])]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_raw(tmp_path / name, part)
    source = open_source(SourceConfig(path=f"{tmp_path}/**/*.npy"), 1000)
    assert source.num_tokens == 100
    for start in range(0, 100, 7):
        for length in (0, 1, 2, 30, 100 - start):
            if start + length <= 100:
                part = source.read(start, length)
                assert part.dtype == np.int64 and (part == tokens[start : start + length]).all()


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, 4), (3, 1), (0, -1)])
def test_reading_outside(tmp_path, start, length):
    source = open_source(SourceConfig(path=write_raw(tmp_path / "a.npy", [1, 2, 3])), 1000)
    with pytest.raises(IndexError):
        source.read(start, length)


def test_indexed(tmp_path):
    prefix = write_indexed(tmp_path / "a", [[1, 2], [3], [4, 5, 6]])
    assert read_all(path=prefix) == [1, 2, 3, 4, 5, 6]


def test_brackets_in_a_real_name(tmp_path):
    assert read_all(path=write_raw(tmp_path / "a[1].npy", [1, 2])) == [1, 2]


def cut(name: str, by: int):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:by] if by < 0 else data + bytes(by))

    return damage


def save(**arguments):
    return lambda folder: np.save(folder / "a.npy", **arguments)


BAD = {
    "missing npy": ("no.npy", {}, None, "no.npy: cannot be read: No such file"),
    "missing prefix": ("no", {}, None, r"no.idx: no such file. A source is a prefix"),
    "missing bin": ("i", {}, lambda folder: (folder / "i.bin").unlink(), "i.bin: no such file"),
    "no match": ("x*.npy", {}, None, r"x\*.npy: no file matches"),
    "other files": ("*", {}, None, "matches .*, which is no .npy shard"),
    "empty": ("a.npy", {}, cut("a.npy", -8), "a.npy: empty"),
    "uint16 cut": (
        "a.npy",
        {},
        cut("a.npy", -1),
        r"a.npy: truncated at byte 7: 1 bytes of a 2-byte token follow byte 6",
    ),
    "uint32 cut": ("a.npy", {"dtype": "uint32"}, cut("a.npy", -2), "truncated at byte 6: 2 bytes of a 4-byte token"),
    "bin cut": ("i", {}, cut("i.bin", -3), "i.bin: truncated at byte 5: .*i.idx has 8 bytes"),
    "bin longer": ("i", {}, cut("i.bin", 2), "i.bin: bytes left over after byte 8"),
    "numpy cut": (
        "n.npy",
        {},
        cut("n.npy", -1),
        "n.npy: truncated at byte 135: its NumPy header has 4 tokens, 136 bytes",
    ),
    "numpy longer": ("n.npy", {}, cut("n.npy", 1), "n.npy: bytes left over after byte 136"),
    "numpy header cut": ("n.npy", {}, cut("n.npy", -100), "n.npy: byte 0: bad NumPy header"),
    "numpy type": ("n.npy", {"dtype": "uint32"}, None, "NumPy header has uint16, the configuration uint32"),
    "numpy floats": ("a.npy", {}, save(arr=np.ones(3)), "NumPy header has float64"),
    "numpy matrix": ("a.npy", {}, save(arr=np.ones((3, 2), np.uint16)), r"header has uint16 \[3, 2\]"),
    "numpy objects": ("a.npy", {}, save(arr=np.array([{}]), allow_pickle=True), "header has object"),
    "numpy empty": ("a.npy", {}, save(arr=np.array([], np.uint16)), "a.npy: empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(tmp_path, case):
    name, config, damage, message = BAD[case]
    write_raw(tmp_path / "a.npy", [1, 2, 3, 4])
    np.save(tmp_path / "n.npy", np.array([1, 2, 3, 4], np.uint16))
    write_indexed(tmp_path / "i", [[1, 2], [3, 4]])
    if damage:
        damage(tmp_path)
    with pytest.raises(DataError, match=message):
        open_source(SourceConfig(path=str(tmp_path / name), **config), 1000)
