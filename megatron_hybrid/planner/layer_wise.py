"""Buffers in which every matrix is whole on one data parallel rank, as megatron-core's layer-wise optimizer lays them out.

Sources, megatron-core 0.19.2: LayerWiseDistributedOptimizer._compute_per_buffer_param_layout (layer_wise_optimizer.py:222) and
param_layout.py. A bucket is divided into equal shards, one per rank. Its matrices, largest first, each go to the emptiest shard.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_hybrid.arch.packing import round_up

PARAMETER_ALIGNMENT = 64  # elements, param_layout.py:pad_param_start
BUCKET_ALIGNMENT = 128  # elements, param_layout.py:bucket_end_divisor
LEAST_FILLED = 0.9
"""A bucket grows until its largest matrix, once per rank, would leave at most a tenth of it empty (PADDING_FLOOR)."""


@dataclass(frozen=True)
class Shards:
    """A buffer of whole matrices."""

    numel: int
    """Elements of the buffer, padding included."""
    owners: tuple[int, ...]
    """Rank that holds each matrix, in the order of the module's parameters."""

    def totals(self, values: Sequence[float], ranks: int) -> list[float]:
        """Return the sum over each rank's matrices of one value per matrix."""
        found = [0.0] * ranks
        for owner, value in zip(self.owners, values, strict=True):
            found[owner] += value
        return found

    def fullest(self, sizes: Sequence[int]) -> int:
        """Return the rank that holds the most elements."""
        held = self.totals(sizes, max(self.owners) + 1)
        return held.index(max(held))


def whole_shards(sizes: Sequence[int], limit: int | None, ranks: int) -> Shards:
    """Lay out matrices of one dtype.

    Args:
        sizes: elements of the matrices, in the order of the module's parameters.
        limit: elements after which a bucket is full. None: one bucket.
    """
    alignment = math.lcm(PARAMETER_ALIGNMENT, math.lcm(ranks, BUCKET_ALIGNMENT) // ranks)
    owners, numel = [0] * len(sizes), 0
    for bucket in _buckets(sizes, limit, ranks):
        filled = [0] * ranks
        for index in sorted(bucket, key=lambda i: -sizes[i]):
            rank = filled.index(min(filled))
            owners[index] = rank
            filled[rank] = round_up(filled[rank], PARAMETER_ALIGNMENT) + sizes[index]
        numel += ranks * round_up(max(filled), alignment)
    return Shards(numel, tuple(owners))


def _buckets(sizes: Sequence[int], limit: int | None, ranks: int) -> Iterator[list[int]]:
    """Yield the indices of each bucket's matrices, last matrix of the module first."""
    here: list[int] = []
    for index in reversed(range(len(sizes))):
        here.append(index)
        largest = max(sizes[i] for i in here)
        if limit is not None and sum(sizes[i] for i in here) >= max(limit, int(ranks * largest * LEAST_FILLED)):
            yield here
            here = []
    if here:
        yield here
