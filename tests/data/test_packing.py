"""Packed documents: every token once, only documents longer than a sequence split, the same index from any number of processes."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from megatron_hybrid.data import packing
from megatron_hybrid.data.packing import Packer, PackingIndex, PackingStatistics, split_documents
from megatron_hybrid.data.work_files import WorkFiles
from tests.data.document_files import find_documents, random_documents, write_corpus
from tests.data.test_best_fit import rooms_one_at_a_time


class Share:
    """Claims every `size`-th piece of work from `rank` on."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def claim(self, work: str, count: int) -> Iterator[int]:
        return iter(range(self.rank, count, self.size))


def pack(packer: Packer) -> PackingIndex:
    for window in range(packer.num_windows):
        packer.pack(window)
    packer.join()
    return packer.open()


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_documents(seed):
    random = np.random.default_rng(seed)
    length = int(random.integers(1, 12))
    bounds = np.cumsum([int(random.integers(0, 50)), *random.integers(1, 40, 25)])
    expected = []
    for start, end in zip(bounds.tolist(), bounds[1:].tolist(), strict=False):
        for first in range(start, end, length):
            expected.append((first, min(length, end - first), first + length < end))
    assert split_documents(bounds, length).tolist() == expected


@pytest.mark.parametrize(("seed", "window"), [(0, 1), *((seed, window) for seed in range(6) for window in (7, 1000))])
def test_every_token_of_every_document_is_in_one_place(tmp_path, monkeypatch, seed, window):
    monkeypatch.setattr(packing, "WINDOW_DOCUMENTS", window)
    random = np.random.default_rng(seed)
    length = int(random.integers(2, 40))
    documents = random_documents(random, 60, 50)
    source = write_corpus(tmp_path / "data", documents, ["index", "metadata", "tokens"][seed % 3])
    found = find_documents(source, tmp_path / "run")
    packer = Packer(found, length, WorkFiles(tmp_path / "run"))
    index = pack(packer)
    sequences = [index.pieces(i) for i in range(index.num_sequences)]
    assert all(1 <= pieces["length"].sum() <= length for pieces in sequences)
    read = Counter(t for p in sequences for start, size, _ in p.tolist() for t in range(start, start + size))
    assert set(read.values()) == {1} and sorted(read) == list(range(source.num_tokens))
    bounds = found.bounds(0, found.num_documents)
    pieces = np.sort(np.concatenate(sequences), order="start")
    assert pieces.tolist() == split_documents(bounds, length).tolist(), (
        "only documents longer than a sequence are split"
    )
    rooms, count = [], found.num_documents
    for number in range(packer.num_windows):
        first, last = count * number // packer.num_windows, count * (number + 1) // packer.num_windows
        rooms += rooms_one_at_a_time(split_documents(bounds[first : last + 1], length)["length"].tolist(), length)
    assert sorted(length - int(p["length"].sum()) for p in sequences) == sorted(rooms)
    assert index.statistics == PackingStatistics(
        documents=60,
        pieces=len(pieces),
        split=sum(len(document) > length for document in documents),
        tokens=source.num_tokens,
        sequences=len(sequences),
        slots=len(sequences) * length,
        most_pieces=max(map(len, sequences)),
        squares=sum(size**2 for p in sequences for size in p["length"].tolist()),
    )


def test_the_index_does_not_depend_on_who_packs(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_DOCUMENTS", 10)
    source = write_corpus(tmp_path / "data", random_documents(np.random.default_rng(0), 60, 50), "tokens")
    indices = []
    for size in (1, 3):
        files = WorkFiles(tmp_path / f"run-{size}")
        packers = [Packer(find_documents(source, files.folder), 32, files) for _ in range(size)]
        for rank, packer in enumerate(packers):
            for window in Share(rank, size).claim("pack", packer.num_windows):
                packer.pack(window)
        packers[0].join()
        indices.append(packers[-1].open())
    one, three = ([index.pieces(i).tolist() for i in range(index.num_sequences)] for index in indices)
    assert one == three


def test_an_interrupted_packing_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_DOCUMENTS", 10)
    source = write_corpus(tmp_path / "data", random_documents(np.random.default_rng(0), 60, 50), "tokens")
    files, packed = WorkFiles(tmp_path / "run"), []
    real = packing.pack_best_fit
    monkeypatch.setattr(packing, "pack_best_fit", lambda *a: packed.append(1) or real(*a))
    packer = Packer(find_documents(source, files.folder), 32, files)
    for window in range(4):
        packer.pack(window)
    pack(Packer(find_documents(source, files.folder), 32, files))
    assert len(packed) == packer.num_windows == 6
    pack(Packer(find_documents(source, files.folder), 32, files))
    assert len(packed) == 6
    pack(Packer(find_documents(source, files.folder), 16, files))
    assert len(packed) == 12, "another sequence_length"


def test_statistics():
    one = PackingStatistics(4, 5, 1, 90, 2, 100, 3)
    total = one + PackingStatistics(1, 1, 0, 10, 1, 50, 1) + PackingStatistics()
    assert total == PackingStatistics(5, 6, 1, 100, 3, 150, 3)
    assert total.metrics() == {
        "packing_efficiency": pytest.approx(100 / 150),
        "packing_pieces_per_sequence": 2.0,
        "packing_split_share": 0.2,
    }
    assert str(total) == (
        "100 tokens in 3 sequences, 66.667% of the slots filled, 2.0 pieces per sequence (at most 3), 1 of 5 documents split"
    )
    assert PackingStatistics().metrics()["packing_efficiency"] == 0.0
