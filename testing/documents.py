"""Packed rows of documents to test with."""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_hybrid.data.sample import Sample, SampleCounts, cu_seqlens_of, starts_of
from megatron_hybrid.distributed.documents import positions
from megatron_hybrid.mixers.documents import Documents

Rows = Sequence[Sequence[int]]
"""Lengths of the documents of each row. All rows have the same sum."""
RAGGED: Rows = ([5, 1, 1, 2, 71, 3, 13], [1, 1, 1, 1, 64, 4, 24], [96])
"""Documents of one token, shorter than the convolution, on and around the edges of chunks, and as long as the row."""


def starts_of_rows(rows: Rows) -> np.ndarray:
    """Return `Batch.documents` of rows of documents: int32 [b, s]."""
    return np.stack([starts_of(np.cumsum([0, *row[:-1]]), sum(row)) for row in rows])


def documents_of(rows: Rows) -> Documents:
    """Return the documents of whole rows, as mixers take them."""
    starts = starts_of_rows(rows)
    starts_bs = torch.from_numpy(starts)
    return Documents(starts_bs, torch.from_numpy(cu_seqlens_of(starts)), positions(starts_bs))


def random_lengths(random: np.random.Generator, length: int) -> list[int]:
    """Return lengths of documents that fill a row, many of one token and few that are long."""
    lengths: list[int] = []
    while (room := length - sum(lengths)) > 0:
        drawn = 1 if random.random() < 0.2 else int(random.lognormal(np.log(length / 6), 1.0)) + 1
        lengths.append(min(drawn, room))
    return lengths


def samples_of_step(step: int, count: int, mode: str, vocab_size: int, length: int) -> list[Sample]:
    """Return learnable samples of random documents: every second token follows from the one before it.

    Args:
        mode: `mask`: documents fill the rows, and the label that crosses a boundary does not count. `pack`: rows end with padding,
            which does not count either.
    """
    random = np.random.default_rng([2000 + step, mode == "pack"])
    return [_sample(random, mode, vocab_size, length) for _ in range(count)]


def _sample(random: np.random.Generator, mode: str, vocab_size: int, length: int) -> Sample:
    padding = int(random.integers(0, length // 4)) if mode == "pack" else 0
    lengths = random_lengths(random, length - padding)
    tokens = random.integers(0, vocab_size, length + 1)
    tokens[1::2] = (tokens[0::2][: len(tokens[1::2])] * 3 + 7) % vocab_size
    if padding:
        lengths.append(padding)
        tokens[length - padding :] = 0
    starts = starts_of(np.cumsum([0, *lengths[:-1]]), length)
    mask = np.ones(length, np.float32)
    mask[np.flatnonzero(np.diff(starts))] = 0
    if padding:
        mask[length - padding - 1 :] = 0
    counted = int(mask.sum())
    counts = SampleCounts(length, counted, length - counted - padding, padding=padding)
    return Sample(tokens[:-1], tokens[1:], mask, starts, counts)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error in the L2 norm."""
    return float((found - expected).norm() / expected.norm())
