"""Parameters in megatron-core's distributed checkpoints: true tensors in equal chunks, whatever the tensor parallel size."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_hybrid.arch.packing import PackedSlice

Offsets = tuple[tuple[int, int, int], ...]
"""megatron-core's offsets along axes: (axis, index, count)."""


def true_tensors(
    whole: ShardedTensor, slices: Sequence[PackedSlice], of_first_rank: Sequence[PackedSlice], outer: Offsets
) -> ShardedTensorFactory:
    """Return the factory that turns a parameter, or optimizer state of its shape, into chunks of true tensors, and back.

    Args:
        whole: the parameter as megatron-core describes it, for its key, data and replica.
        slices: this rank's. It has none if it holds only padding. megatron-core forgets factories that build nothing, so such a
            rank names the first chunk of all, as a replica that is neither saved nor used.
        of_first_rank: the first rank's, which holds some of every tensor.
        outer: offsets along axes before the parameter's own (layers).
    """
    shape, example = whole.data.shape, of_first_rank[0]

    def build(key: str, tensor: torch.Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        if not slices:
            unused = torch.zeros(example.chunk, dtype=tensor.dtype, device=tensor.device)
            replica = replica_id if isinstance(replica_id, tuple) else (replica_id,)
            at = (0,) * len(example.chunk)
            return [_chunk(name_of(example, key), unused, example, at, (*replica, 1), outer)]
        return [
            _chunk(name_of(packed, key), values, packed, index, replica_id, outer)
            for packed in slices
            for index, values in _chunks(packed, tensor)
        ]

    def name_of(packed: PackedSlice, key: str) -> str:
        return f"{key}.{packed.tensor.name.split('.')[0]}" if len(of_first_rank) > 1 else key

    @torch.no_grad()
    def merge(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        merged, rest = torch.zeros(shape, dtype=parts[0].dtype, device=parts[0].device), iter(parts)
        for packed in slices:
            for _, place in _chunks(packed, merged):
                place.copy_(next(rest))
        return merged

    return ShardedTensorFactory(whole.key, whole.data, build, merge, whole.replica_id)


def _chunks(packed: PackedSlice, parameter: torch.Tensor) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Yield (index among the true tensor's chunks, view of the parameter) for each chunk of the slice."""
    counts = [range(length // size) for length, size in zip(packed.source.shape, packed.chunk, strict=True)]
    for at in product(*counts):
        values = packed.target.narrow(parameter)
        for dim, (i, size) in enumerate(zip(at, packed.chunk, strict=True)):
            values = values.narrow(dim, i * size, size)
        first = (start // size for start, size in zip(packed.source.offset, packed.chunk, strict=True))
        yield tuple(a + b for a, b in zip(first, at, strict=True)), values


def _chunk(
    key: str, data: torch.Tensor, packed: PackedSlice, index: tuple[int, ...], replica_id: Any, outer: Offsets
) -> ShardedTensor:
    counts = [total // size for total, size in zip(packed.tensor.shape, packed.chunk, strict=True)]
    offsets = [(len(outer) + dim, i, count) for dim, (i, count) in enumerate(zip(index, counts, strict=True))]
    return ShardedTensor.from_rank_offsets(
        key, data, *outer, *offsets, replica_id=replica_id, prepend_axis_num=len(outer)
    )
