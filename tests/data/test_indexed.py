"""The indexed format, both ways with megatron-core's own reader and builder."""

import struct

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_hybrid.config.data import SourceConfig
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import DTYPES, IndexedWriter, read_index, smallest_dtype
from megatron_hybrid.data.sources import open_source
from megatron_hybrid.data.validate import check_index, validate_source
from tests.data.files import write_indexed

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12]]
TOKENS = [token for document in DOCUMENTS for token in document]


def build_theirs(prefix: str, dtype, multimodal: bool = False, by_item: bool = False) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=multimodal)
    for document in DOCUMENTS:
        if by_item:  # a document of several sequences
            for token in document:
                builder.add_item(torch.tensor([token]))
            builder.end_document()
        else:
            builder.add_document(torch.tensor(document), [len(document)], [0] if multimodal else None)
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint8", "int64"])
def test_megatron_reads_ours(tmp_path, dtype):
    prefix = write_indexed(tmp_path / "a", DOCUMENTS, dtype)
    theirs = IndexedDataset(prefix)
    assert theirs.index.dtype == np.dtype(dtype)
    assert [sequence.tolist() for sequence in theirs[:]] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("how", [{}, {"multimodal": True}, {"by_item": True}])
def test_ours_reads_megatrons(tmp_path, dtype, how):
    prefix = str(tmp_path / "a")
    build_theirs(prefix, dtype, **how)
    source = open_source(SourceConfig(path=prefix), 13)
    validate_source(source, 13)
    assert source.num_tokens == len(TOKENS) and source.read(0, len(TOKENS)).tolist() == TOKENS


def test_files_are_byte_identical_to_megatrons(tmp_path):
    build_theirs(str(tmp_path / "theirs"), np.uint16)
    write_indexed(tmp_path / "ours", DOCUMENTS)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_add_takes_several_documents_at_once(tmp_path):
    with IndexedWriter(tmp_path / "a", np.dtype("uint16"), sha256=True) as writer:
        writer.add(np.array(TOKENS[:4]), np.array([3, 1]))
        writer.add(np.array([]), np.array([], int))
        writer.add(np.array(TOKENS[4:]), np.array([6, 2]))
        assert (writer.num_documents, writer.num_tokens, writer.max_token) == (4, 12, 12)
        writer.finish()
    write_indexed(tmp_path / "b", DOCUMENTS)
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()


def test_nothing_stands_under_the_names_before_finish(tmp_path):
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "a", np.dtype("uint16")) as writer:
        writer.add(np.array([1]), np.array([1]))
        assert not list(tmp_path.glob("a.[bi][id][nx]"))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(257, "uint16"), (65536, "uint16"), (65537, "int32"), (100352, "int32")]
)
def test_smallest_dtype(vocab_size, dtype):
    assert smallest_dtype(vocab_size) == np.dtype(dtype)


def edit(offset: int, format_: str, value: int):
    def change(data: bytearray) -> bytearray:
        struct.pack_into(format_, data, offset, value)
        return data

    return change


N = len(DOCUMENTS)
BAD_INDEXES = {
    "empty": (lambda data: b"", "byte 0: b'' is not the magic"),
    "magic": (edit(3, "<B", 0), "byte 0: .* is not the magic"),
    "a text": (lambda data: b"hello", "byte 0: b'hello' is not the magic"),
    "header cut": (lambda data: data[:20], "truncated at byte 20, inside its header"),
    "version": (edit(9, "<Q", 2), "byte 9: version 2"),
    "type": (edit(17, "<B", 99), "byte 17: type code 99"),
    "float": (edit(17, "<B", 7), "byte 17: type code 7 is no integer type"),
    "none": (edit(18, "<Q", 0), "byte 18: no sequences"),
    "huge": (edit(18, "<Q", 2**64 - 1), "truncated at byte"),
    "more": (edit(26, "<Q", N + 2), "truncated at byte"),
    "fewer": (edit(26, "<Q", N), "bytes left over after byte"),
    "cut": (lambda data: data[:-1], "truncated at byte"),
    "longer": (lambda data: data + b"\0" * 9, "bytes left over"),
    "negative length": (edit(34 + 4, "<i", -1), "byte 38: sequence length -1 is negative"),
    "wrong length": (edit(34, "<i", 4), f"byte {34 + 4 * N + 8}: sequence pointer 6 is not where"),
    "pointer": (
        edit(34 + 4 * N + 16, "<q", 10**9),
        f"byte {34 + 4 * N + 16}: sequence pointer 1000000000 is not where",
    ),
    "negative pointer": (edit(34 + 4 * N, "<q", -2), f"byte {34 + 4 * N}: sequence pointer -2"),
    "first document": (
        edit(34 + 12 * N, "<q", 1),
        f"byte {34 + 12 * N}: document indices do not go from sequence 0 to 4",
    ),
    "last document": (edit(34 + 12 * N + 8 * N, "<q", 3), f"byte {34 + 12 * N}: document indices do not go"),
    "document order": (edit(34 + 12 * N + 8, "<q", 3), f"byte {34 + 12 * N + 16}: document index 2 is out of order"),
    "document range": (edit(34 + 12 * N + 16, "<q", 99), f"byte {34 + 12 * N + 16}: document index 99 is out of"),
    "negative document": (edit(34 + 12 * N + 8, "<q", -1), f"byte {34 + 12 * N + 8}: document index -1 is out of"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_bad_indexes_are_named(tmp_path, case):
    change, message = BAD_INDEXES[case]
    write_indexed(tmp_path / "a", DOCUMENTS)
    file = tmp_path / "a.idx"
    file.write_bytes(change(bytearray(file.read_bytes())))
    with pytest.raises(DataError, match=rf"a.idx: {message}"):
        check_index(read_index(file))


def test_damaged_indexes_never_crash(tmp_path):
    """Random damage, fixed seed: either an error that names a file, or exactly the tokens that were written."""
    random = np.random.default_rng(0)
    prefix = write_indexed(tmp_path / "a", DOCUMENTS)
    file = tmp_path / "a.idx"
    intact = file.read_bytes()
    outcomes = {"error": 0, "read": 0}
    for _ in range(600):
        data = bytearray(intact)
        for _ in range(random.integers(1, 4)):
            where = int(random.integers(len(data)))
            match random.integers(4):
                case 0:
                    data[where] ^= 1 << int(random.integers(8))
                case 1:
                    data[where] = int(random.choice([0, 1, 127, 128, 255]))
                case 2:
                    del data[where:]
                    data += random.bytes(int(random.integers(9)))
                case 3:
                    data[where : where + 8] = struct.pack("<q", int(random.integers(-(2**62), 2**62)))
            if not data:
                break
        file.write_bytes(data)
        try:
            source = open_source(SourceConfig(path=prefix), 13)
            validate_source(source, 13)
        except DataError as error:
            assert "a.idx: " in str(error) or "a.bin: " in str(error)
            outcomes["error"] += 1
        else:
            assert source.shards[0].dtype == np.uint16 and source.read(0, 12).tolist() == TOKENS
            outcomes["read"] += 1
    assert outcomes["error"] > 400 and outcomes["read"] > 0
