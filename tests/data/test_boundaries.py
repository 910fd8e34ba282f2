"""Document boundaries of real files: megatron-core's builder, OLMo-core's metadata, end-of-document tokens."""

import gzip

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_hybrid.config.data import SourceConfig
from megatron_hybrid.data import boundaries
from megatron_hybrid.data.boundaries import find_boundaries
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import HEADER_BYTES
from megatron_hybrid.data.source_documents import DocumentFinder
from megatron_hybrid.data.sources import open_source
from megatron_hybrid.data.work_files import WorkFiles
from tests.data.document_files import EOS, find_documents, random_documents, write_corpus, write_metadata
from tests.data.files import write_indexed, write_raw


def shard_of(path: str):
    return open_source(SourceConfig(path=path), 60_000).shards[0]


@pytest.mark.parametrize("kind", ["index", "metadata", "tokens"])
@pytest.mark.parametrize("seed", range(5))
def test_all_formats_give_the_documents(tmp_path, monkeypatch, kind, seed):
    monkeypatch.setattr(boundaries, "_CHUNK_BYTES", 64)
    monkeypatch.setattr(boundaries, "_CHUNK_ENTRIES", 7)
    random = np.random.default_rng(seed)
    documents = random_documents(random, 50, 20)
    source = write_corpus(tmp_path / "data", documents, kind)
    found = find_documents(source, tmp_path / "run", None if kind != "tokens" else EOS)
    assert found.num_documents == 50 and found.num_empty == found.num_uncovered_tokens == 0
    ends = np.cumsum([0, *map(len, documents)])
    assert found.bounds(0, 50).tolist() == ends.tolist()
    for first, last in random.integers(0, 51, (20, 2)):
        expected = ends[first : last + 1].tolist() if first < last else []
        assert found.bounds(first, last).tolist() == expected
    for start, stop in np.sort(random.integers(0, source.num_tokens, (40, 2))):
        assert found.starts_within(start, stop).tolist() == [e for e in ends[:-1].tolist() if start <= e < stop]


def test_megatron_cores_builder(tmp_path):
    """Documents of several sequences, without tokens, and of one token, as megatron-core writes them."""
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    for document in [[[1, 2], [3]], [[]], [[4]], [[5, 6, 7], [], [8]], [[]]]:
        for sentence in document:
            builder.add_item(torch.tensor(sentence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    found = find_boundaries(shard_of(str(tmp_path / "a")), None)
    assert found.bounds.tolist() == [0, 3, 4, 8] and found.empty == 2


def test_metadata_wins_over_tokens_and_may_have_gaps_and_empty_documents(tmp_path):
    path = write_raw(tmp_path / "a.npy", [5, EOS, 6, 7, EOS, 8, 9, 1])
    assert find_boundaries(shard_of(path), EOS).bounds.tolist() == [0, 2, 5, 8]
    with gzip.open(tmp_path / "a.csv.gz", "wt") as file:
        file.write("1,2,x\n2,2,empty\n2,5\n6,7,last\n")
    found = find_boundaries(shard_of(path), EOS)
    assert found.bounds.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert (found.empty, found.uncovered) == (1, 1 + 1 + 1)
    source = open_source(SourceConfig(path=path), 60_000)
    assert str(find_documents(source, tmp_path / "run")) == (
        "6 documents in 1 files, 1 empty ones left out, 3 tokens outside the documents of the metadata"
    )


def test_olmo_cores_own_metadata(tmp_path):
    utils = pytest.importorskip("olmo_core.data.utils", reason="ai2-olmo-core is not installed")
    documents = random_documents(np.random.default_rng(0), 40, 20)
    path = write_raw(tmp_path / "a.npy", [token for document in documents for token in document] + [7, 8])
    from_tokens = find_boundaries(shard_of(path), EOS)
    utils.write_document_indices(tmp_path / "a.npy", dtype=np.uint16, eos_token_id=EOS)
    found = find_boundaries(shard_of(path), None)
    assert (found.bounds == from_tokens.bounds).all() and found.uncovered == 2
    theirs = list(utils.iter_document_indices(path, use_array_if_local=False, dtype=np.uint16))
    assert list(zip(found.bounds.tolist(), found.bounds[1:].tolist(), strict=False))[:-1] == theirs


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([EOS], [0, 1]),
        ([5], [0, 1]),
        ([EOS, EOS, EOS], [0, 1, 2, 3]),
        ([5, EOS, 6], [0, 2, 3]),
        ([EOS, 5, EOS], [0, 1, 3]),
    ],
)
def test_end_of_document_tokens(tmp_path, tokens, expected):
    assert find_boundaries(shard_of(write_raw(tmp_path / "a.npy", tokens)), EOS).bounds.tolist() == expected


def test_an_end_of_document_token_that_the_type_cannot_hold_is_not_found(tmp_path):
    source = write_corpus(tmp_path / "data", [[1, 2, 3]] * 6, "tokens")
    with pytest.raises(DataError, match=r"token 100257 \(model.eos_token_id\) ends no document"):
        find_documents(source, tmp_path / "run", 100257)


def test_unknown_boundaries_name_the_remedy(tmp_path):
    path = write_raw(tmp_path / "a.npy", [1, 2, 3])
    with pytest.raises(DataError, match=r"a.npy: .*no a.csv.gz .*Set model.eos_token_id .*data.documents to keep"):
        find_boundaries(shard_of(path), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,2\nid,3\n", r"line 2: 'id,3' does not begin with `start,end`"),
        ("0\n", r"line 1: '0' does not begin"),
        ("0,2\n1,3\n", r"line 2: document \[1, 3\) overlaps the one before"),
        ("2,1\n", r"line 1: document \[2, 1\)"),
        ("0,2\n2,9\n", r"line 2: document \[2, 9\) .*exceeds the 3 tokens .*metadata is of another file"),
        ("0,99999999999999999999999\n", r"line 1: a number is too large"),
    ],
)
def test_bad_metadata(tmp_path, text, message):
    path = write_raw(tmp_path / "a.npy", [1, 2, 3])
    with gzip.open(tmp_path / "a.csv.gz", "wt") as file:
        file.write(text)
    with pytest.raises(DataError, match=rf"a.csv.gz: {message}"):
        find_boundaries(shard_of(path), None)


def test_truncated_metadata(tmp_path):
    path = write_raw(tmp_path / "a.npy", np.arange(3000))
    write_metadata(tmp_path / "a.csv.gz", [1] * 3000)
    (tmp_path / "a.csv.gz").write_bytes((tmp_path / "a.csv.gz").read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"a.csv.gz: cannot be read: .*Copy the file again"):
        find_boundaries(shard_of(path), None)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        (0, 1, r"byte 70: the document indices do not run from sequence 0 to 3"),
        (3, 2, "do not run from"),
        (1, 99, "outside 0 to 3"),
        (1, 3, r"byte 86: document indices are out of order"),
    ],
)
def test_bad_document_indices(tmp_path, entry, value, message):
    prefix = write_indexed(tmp_path / "a", [[1, 2], [3], [4]])
    data = bytearray((tmp_path / "a.idx").read_bytes())
    place = HEADER_BYTES + 12 * 3 + 8 * entry
    data[place : place + 8] = np.int64(value).tobytes()
    (tmp_path / "a.idx").write_bytes(data)
    with pytest.raises(DataError, match=rf"a.idx: .*{message}"):
        find_boundaries(shard_of(prefix), None)


def test_results_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    documents = random_documents(np.random.default_rng(0), 30, 9)
    source = write_corpus(tmp_path / "data", documents, "tokens")
    find_documents(source, tmp_path / "run")
    monkeypatch.setattr("megatron_hybrid.data.source_documents.find_boundaries", lambda *_: pytest.fail("read again"))
    found = find_documents(source, tmp_path / "run")
    assert found.num_documents == 30
    monkeypatch.undo()
    changed = write_corpus(tmp_path / "data", documents + [[7, 7, EOS]], "tokens")
    assert find_documents(changed, tmp_path / "run").num_documents == 31


def test_a_result_of_another_process_that_is_missing(tmp_path):
    source = write_corpus(tmp_path / "data", random_documents(np.random.default_rng(0), 30, 9), "tokens")
    finder = DocumentFinder(source, EOS, WorkFiles(tmp_path / "run"))
    finder.find(0)
    with pytest.raises(
        DataError, match="is missing or damaged: the run's folder must be on a file system that all nodes"
    ):
        finder.open()
