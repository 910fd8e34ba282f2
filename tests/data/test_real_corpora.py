"""Two real corpora, tokenized by bytes, blended and packed: every token is read once, and none is lost when a run resumes."""

from collections import Counter
from pathlib import Path

import numpy as np
import packaging
import pydantic
import pytest

from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.data.blend import Blend
from megatron_hybrid.data.build import build_train_and_validation, open_sources
from megatron_hybrid.data.document_dataset import packing_statistics
from megatron_hybrid.data.loader import BatchLoader
from megatron_hybrid.data.prepare_documents import DocumentPreparation, prepare_alone
from megatron_hybrid.data.preprocess import preprocess
from megatron_hybrid.data.sample import SampleCounts

LENGTH, VOCABULARY = 2048, 257
PACKAGES = {"packaging": packaging, "pydantic": pydantic}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Prefixes of the sources of two installed packages, and what `preprocess` says of each."""
    folder = tmp_path_factory.mktemp("corpora")
    found = {}
    for name, package in PACKAGES.items():
        prefix = str(folder / name)
        found[prefix] = preprocess([Path(package.__file__).parent], prefix, include=["*.py"])[prefix]
    return folder, found


def packed(corpora) -> Blend:
    """The blend in which both corpora end at the same time."""
    folder, found = corpora

    def build(weights: list[float]) -> Blend:
        train = tuple({"path": path, "weight": weight} for path, weight in zip(found, weights, strict=True))
        config = DataConfig(train=train, sequence_length=LENGTH, documents="pack")
        opened = open_sources(config, VOCABULARY)
        documents = prepare_alone(DocumentPreparation(opened, config, None, folder))
        return build_train_and_validation(config, VOCABULARY, documents=documents)[0]

    return build([float(dataset.samples_per_epoch) for dataset in build([1.0, 1.0]).datasets])


def test_an_epoch_counts_or_masks_every_token(corpora):
    blend, (_, found) = packed(corpora), corpora
    samples = [blend.sample(index) for index in range(sum(d.samples_per_epoch for d in blend.datasets))]
    counts = sum((sample.counts for sample in samples), SampleCounts())
    tokens, documents = (sum(getattr(s, what) for s in found.values()) for what in ("tokens", "documents"))
    assert tokens > 300_000 and blend.samples_without_repeats() == len(samples)
    assert counts.tokens == tokens and counts.crossing == documents and counts.filtered == 0
    assert counts.counted == tokens - documents == sum(int(sample.loss_mask.sum()) for sample in samples)
    assert counts.slots == len(samples) * LENGTH == counts.counted + counts.crossing + counts.padding
    statistics = packing_statistics(blend.datasets)
    assert statistics.tokens == tokens and statistics.slots == counts.slots
    assert statistics.efficiency > 0.95

    read = sum((Counter(s.tokens[: s.counts.tokens].tolist()) for s in samples), Counter())
    on_disk = Counter(np.concatenate([np.fromfile(f"{prefix}.bin", "uint16") for prefix in found]).tolist())
    assert read == on_disk, "the same bytes, as often"


def test_a_run_that_resumes_with_more_ranks_repeats_and_loses_nothing(corpora):
    blend = packed(corpora)
    length = blend.samples_without_repeats() // 24 * 24
    rows = []
    for ranks, micro_batch_size, first, last, size in ((2, 3, 0, 48, 12), (4, 1, 48, length, 24)):
        loaders = [
            BatchLoader(blend, micro_batch_size, data_parallel_rank=r, data_parallel_size=ranks) for r in range(ranks)
        ]
        for start in range(first, last, size):
            for batches in zip(*(loader.global_batch(start, size) for loader in loaders), strict=True):
                for batch in batches:
                    rows += zip(batch.tokens.numpy(), batch.loss_mask.numpy(), batch.documents.numpy(), strict=True)
        for loader in loaders:
            loader.close()
    assert len(rows) == length and len({tokens.tobytes() for tokens, _, _ in rows}) == length
    for index, (tokens, mask, starts) in enumerate(rows):
        sample = blend.sample(index)
        assert (tokens == sample.tokens).all() and (mask == sample.loss_mask).all() and (starts == sample.starts).all()
