"""Samples with documents: content against a loop over documents, accounting, order, blends, identity."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from megatron_hybrid.config.data import DataConfig, InstanceFilterConfig
from megatron_hybrid.data import packing
from megatron_hybrid.data.build import build_train_and_validation, open_sources
from megatron_hybrid.data.dataset import FixedLengthDataset
from megatron_hybrid.data.document_dataset import DocumentDataset
from megatron_hybrid.data.fingerprint import data_identity, identity_changes
from megatron_hybrid.data.loader import BatchLoader
from megatron_hybrid.data.prepare_documents import DocumentPreparation, prepare_alone
from megatron_hybrid.data.sample import LEAST_CAPACITY, SampleCounts, cu_seqlens_of, starts_of
from megatron_hybrid.data.sample_readers import MaskedReader, StreamReader
from tests.data.document_files import EOS, VOCABULARY, find_documents, random_documents, write_corpus
from tests.data.files import write_raw
from tests.data.test_packing import Share


def configuration(tmp_path, mode: str) -> DataConfig:
    """Two corpora of different formats, blended."""
    random = np.random.default_rng(0)
    for name, kind in (("one", "index"), ("other", "tokens")):
        if not (tmp_path / name).exists():
            write_corpus(tmp_path / name, random_documents(random, 80, 40), kind)
    train = ({"path": str(tmp_path / "one" / "corpus"), "weight": 2.0}, {"path": str(tmp_path / "other" / "*.npy")})
    return DataConfig(train=train, sequence_length=16, documents=mode)


def prepare(config: DataConfig, folder) -> DocumentPreparation:
    return prepare_alone(DocumentPreparation(open_sources(config, VOCABULARY), config, EOS, folder))


def build(config: DataConfig, folder):
    documents = prepare(config, folder) if config.documents != "keep" else None
    return build_train_and_validation(config, VOCABULARY, documents=documents)[0]


def total(samples) -> SampleCounts:
    return sum((sample.counts for sample in samples), SampleCounts())


@pytest.mark.parametrize("kind", ["index", "metadata", "tokens"])
@pytest.mark.parametrize("seed", range(8))
def test_mask_is_the_stream_cut_at_documents(tmp_path, kind, seed):
    random = np.random.default_rng(seed)
    length = int(random.integers(1, 30))
    documents = random_documents(random, 60, 25)
    source = write_corpus(tmp_path / "data", documents, kind)
    plain = FixedLengthDataset(source, length, seed)
    masked = DocumentDataset(MaskedReader(find_documents(source, tmp_path / "run"), length), seed)
    document_of = np.repeat(np.arange(60), [len(document) for document in documents])
    assert masked.samples_per_epoch == plain.samples_per_epoch
    for index in range(2 * plain.samples_per_epoch):
        tokens, sample = plain.sample(index), masked.sample(index)
        assert (sample.tokens == tokens[:-1]).all() and (sample.labels == tokens[1:]).all()
        begin = plain.position(index)[1] * length
        here = document_of[begin : begin + length + 1].tolist()
        assert sample.loss_mask.tolist() == [float(a == b) for a, b in zip(here, here[1:], strict=False)]
        assert sample.starts.tolist() == [here.index(document) for document in here[:-1]]
        assert sample.starts.dtype == np.int32
        assert sample.counts.counted == sample.loss_mask.sum()
        assert sample.counts.counted + sample.counts.crossing == sample.counts.slots == length


@pytest.mark.parametrize("kind", ["index", "metadata", "tokens"])
@pytest.mark.parametrize("seed", range(8))
def test_pack_reads_every_token_and_predicts_all_but_the_first_of_each_document(tmp_path, kind, seed):
    random = np.random.default_rng(seed)
    length = int(random.integers(2, 30))
    documents = random_documents(random, 60, 45)
    write_corpus(tmp_path / "data", documents, kind)
    path = str(tmp_path / "data" / ("corpus" if kind == "index" else "*.npy"))
    dataset = build(DataConfig(train=({"path": path},), sequence_length=length, documents="pack"), tmp_path / "run")
    samples = [dataset.sample(i) for i in range(dataset.datasets[0].samples_per_epoch)]
    pairs, inputs, padding = Counter(), Counter(), 0
    for sample in samples:
        used = sample.counts.tokens
        padding += length - used
        assert not sample.loss_mask[used:].any() and not sample.tokens[used:].any()
        assert used == length or (sample.starts[used:] == used).all()
        inputs.update(sample.tokens[:used].tolist())
        pairs.update(zip(*(x[sample.loss_mask > 0].tolist() for x in (sample.tokens, sample.labels)), strict=True))
        for i, start in enumerate(sample.starts[:used].tolist()):
            assert start <= i and (i == start or sample.labels[i - 1] == sample.tokens[i]), "one document, in order"
    assert inputs == Counter(token for document in documents for token in document)
    assert pairs == Counter(pair for d in documents for pair in zip(d, d[1:], strict=False))
    counts, tokens = total(samples), sum(map(len, documents))
    assert counts.tokens == counts.counted + counts.crossing == tokens and counts.padding == padding
    assert (counts.counted, counts.crossing) == (tokens - 60, 60) and counts.slots == len(samples) * length


def rows_of(loaders: list[BatchLoader], consumed: int, size: int) -> list[tuple]:
    """The sequences of a global batch in the order of their index, from all ranks: tokens, labels, loss mask, starts."""
    batches = [list(loader.global_batch(consumed, size)) for loader in loaders]
    rows = []
    for step in zip(*batches, strict=True):
        for batch in step:
            parts = (batch.tokens, batch.labels, batch.loss_mask, batch.documents)
            rows += zip(*(part.tolist() for part in parts), strict=True)
            assert batch.counts.counted == int(batch.loss_mask.sum())
    return rows


@pytest.mark.parametrize("mode", ["mask", "pack"])
def test_the_order_is_the_same_for_all_ranks_and_micro_batches_and_after_a_resume(tmp_path, mode):
    config = configuration(tmp_path, mode)
    one = [BatchLoader(build(config, tmp_path / "run"), 16, num_workers=0)]
    whole = rows_of(one, 0, 16) + rows_of(one, 16, 32)
    assert len({str(row) for row in whole}) == 48
    for size, micro in ((1, 4), (2, 2), (4, 1), (4, 2)):
        blend = build(config, tmp_path / "run")
        ranks = [
            BatchLoader(blend, micro, data_parallel_rank=rank, data_parallel_size=size, num_workers=0)
            for rank in range(size)
        ]
        assert rows_of(ranks, 16, 32) == whole[16:], "resumed"
        assert rows_of(ranks, 0, 16) == whole[:16]


def test_two_packed_corpora_lose_and_repeat_nothing_when_the_ranks_change(tmp_path):
    """Read until the heavier corpus has been read once, with other ranks after half of it."""
    config = configuration(tmp_path, "pack")
    blend = build(config, tmp_path / "run")
    epochs = [dataset.samples_per_epoch for dataset in blend.datasets]
    total_samples = next(n for n in range(0, 10_000, 8) if all(c >= e for c, e in zip(blend.counts(n), epochs)))
    counts, consumed = SampleCounts(), 0
    while consumed < total_samples:
        size = 2 if consumed < total_samples // 2 else 4
        for rank in range(size):
            loader = BatchLoader(blend, 1, data_parallel_rank=rank, data_parallel_size=size, num_workers=0)
            counts += sum((batch.counts for batch in loader.global_batch(consumed, 8)), SampleCounts())
        consumed += 8
    assert counts.slots == total_samples * 16
    assert counts.counted + counts.crossing == counts.tokens == counts.slots - counts.padding
    first_epoch = [total(d.reader.read(place) for place in range(d.samples_per_epoch)) for d in blend.datasets]
    assert [c.tokens for c in first_epoch] == [dataset.source.num_tokens for dataset in blend.datasets]
    again = [Counter(d.position(i) for i in range(n)) for d, n in zip(blend.datasets, blend.counts(total_samples))]
    expected = SampleCounts()
    for dataset, seen in zip(blend.datasets, again, strict=True):
        assert set(seen.values()) == {1}
        expected += total(dataset.reader.read(place) for _, place in seen)
    assert counts == expected


def test_none_is_repeated_or_lost_in_a_blend(tmp_path):
    config = configuration(tmp_path, "pack")
    blend = build(config, tmp_path / "run")
    count = 400
    given = [Counter(), Counter()]
    for i in range(count):
        which, number = blend.locate(i)
        given[which][blend.datasets[which].position(number)] += 1
    assert [sum(g.values()) for g in given] == blend.counts(count)
    for dataset, seen in zip(blend.datasets, given, strict=True):
        assert set(seen.values()) == {1}
        assert {p for e, p in seen if e == 0} == set(range(dataset.samples_per_epoch))


def test_seeds_and_epochs_change_the_order(tmp_path):
    def first():
        blend = build(configuration(tmp_path, "pack"), tmp_path / "run")
        return [blend.datasets[0].position(i) for i in range(2 * blend.datasets[0].samples_per_epoch)]

    order = first()
    assert order == first()
    other = build(configuration(tmp_path, "pack").model_copy(update={"seed": 1}), tmp_path / "run").datasets[0]
    assert order != [other.position(i) for i in range(len(order))]
    half = len(order) // 2
    assert sorted(p for _, p in order[:half]) == sorted(p for _, p in order[half:])
    assert [p for _, p in order[:half]] != [p for _, p in order[half:]]


def test_processes_share_the_preparation(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_DOCUMENTS", 16)
    config = configuration(tmp_path, "pack")
    ranks = [DocumentPreparation(open_sources(config, VOCABULARY), config, EOS, tmp_path / "run") for _ in range(3)]
    for stages in zip(*(rank.stages for rank in ranks), strict=True):
        for number, stage in enumerate(stages):
            stage(Share(number, 3))
    for rank in ranks:
        rank.open()
    alone = prepare(config, tmp_path / "alone")
    assert {rank.statistics for rank in ranks} == {alone.statistics} and alone.statistics.documents == 160
    blends = [build_train_and_validation(config, VOCABULARY, documents=d)[0] for d in (*ranks, alone)]
    for i in range(30):
        assert len({blend.sample(i).tokens.tobytes() for blend in blends}) == 1


def test_keep_is_the_stream(tmp_path):
    config = configuration(tmp_path, "keep")
    blend = build(config, tmp_path / "run")
    filtered = build(config.model_copy(update={"instance_filter": InstanceFilterConfig()}), tmp_path / "run")
    assert all(type(dataset) is FixedLengthDataset for dataset in blend.datasets)
    for i in range(50):
        tokens, sample = blend.sample(i), filtered.sample(i)
        assert (sample.tokens == tokens[:-1]).all() and (sample.labels == tokens[1:]).all()
        assert sample.loss_mask.all() and sample.starts is None
    with pytest.raises(ValueError, match="needed with data.documents = pack"):
        build_train_and_validation(configuration(tmp_path, "pack"), VOCABULARY)


def test_the_instance_filter_excludes_samples_from_the_loss_and_counts_them(tmp_path):
    tokens = np.random.default_rng(0).permutation(4000)
    tokens[1000:1064] = 7  # of samples 10 and, short of 32, none
    tokens[1800:1831] = 7
    config = DataConfig(train=({"path": write_raw(tmp_path / "a.npy", tokens)},), sequence_length=100)
    source = next(iter(open_sources(config, VOCABULARY).values()))
    dataset = DocumentDataset(StreamReader(source, 100), 0, InstanceFilterConfig(), shuffle=False)
    samples = [dataset.sample(i) for i in range(dataset.samples_per_epoch)]
    assert [i for i, sample in enumerate(samples) if not sample.loss_mask.any()] == [10]
    assert total(samples) == SampleCounts(slots=3900, counted=3800, filtered=100, filtered_samples=1)


@pytest.mark.parametrize("length", [40, 64])
def test_padding_is_no_repetition(tmp_path, length):
    write_raw(tmp_path / "a.npy", [1, 2, EOS, 3, EOS])
    config = DataConfig(
        train=({"path": str(tmp_path / "a.npy")},), sequence_length=length, documents="pack", instance_filter={}
    )
    sample = build(config, tmp_path / "run").sample(0)
    assert sample.counts == SampleCounts(slots=length, counted=3, crossing=2, padding=length - 5)
    assert sample.tokens[:5].tolist() == [1, 2, EOS, 3, EOS] and sample.starts[:6].tolist() == [0, 0, 0, 3, 3, 5]
    assert sample.loss_mask[:6].tolist() == [1, 1, 0, 1, 0, 0]


def test_identity(tmp_path):
    identities = {
        mode: data_identity(build(configuration(tmp_path, mode), tmp_path / "run"), 1234)
        for mode in ("keep", "mask", "pack")
    }
    assert all("documents" not in source for source in identities["keep"]["sources"])
    fields = {f"data.train.{i}.documents" for i in range(2)}
    for before in identities:
        for after in identities:
            assert identity_changes(identities[before], identities[after]).keys() == (
                set() if before == after else fields
            )
    moved = data_identity(build(configuration(tmp_path, "pack"), tmp_path / "another"), 1234)
    assert moved == identities["pack"]
    source = identities["pack"]["sources"][0]
    other = identities["pack"] | {"sources": [source | {"documents": "0"}, identities["pack"]["sources"][1]]}
    assert identity_changes(identities["pack"], other).keys() == {"data.train.0.documents"}


def test_counts_add_up():
    counts = SampleCounts(10, 6, 2, 0, 2)
    both = counts + replace(counts, counted=0, filtered=6, filtered_samples=1)
    assert both == SampleCounts(20, 6, 4, 6, 4, 1) and both.tokens == 16
    assert both.metrics() == {
        "counted_share": 0.3,
        "padding_share": 0.2,
        "filtered_share": 0.3,
        "filtered_samples": 1,
    }
    assert SampleCounts().metrics()["counted_share"] == 0


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 40])
def test_boundaries_of_a_micro_batch(rows, count):
    firsts = np.sort(np.random.default_rng(count).permutation(np.arange(1, 64))[:count])
    starts = np.stack([starts_of(firsts, 64)] * rows)
    found, expected = (
        cu_seqlens_of(starts),
        [row * 64 + first for row in range(rows) for first in [0, *firsts.tolist()]],
    )
    capacity = len(found) - 1
    assert capacity >= LEAST_CAPACITY and capacity & (capacity - 1) == 0 and found.dtype == np.int32
    assert capacity == LEAST_CAPACITY or capacity < 2 * len(expected)
    assert found.tolist() == expected + [64 * rows] * (capacity + 1 - len(expected))
