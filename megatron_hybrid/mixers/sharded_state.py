"""Parameters in megatron-core's distributed checkpoints: true tensors in equal chunks, whatever the tensor parallel size."""

from itertools import product

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_hybrid.mixers.tensor_slices import Piece


def true_tensors(
    whole: ShardedTensor, pieces: list[Piece], of_first_rank: list[Piece], outer: tuple[tuple[int, int, int], ...]
) -> ShardedTensorFactory:
    """Return the factory that turns a parameter, or optimizer state of its shape, into chunks of true tensors, and back.

    Args:
        whole: the parameter as megatron-core describes it, for its key, data and replica.
        pieces: this rank's. None where it holds only padding: megatron-core forgets factories that build nothing, so that rank
            names the first chunk of all, as a replica that is neither saved nor used.
        of_first_rank: the first rank's, which holds some of every tensor.
        outer: megatron-core's offsets along axes before the parameter's own (layers): (axis, index, count).
    """
    shape, example = whole.data.shape, of_first_rank[0]

    def build(key, tensor, replica_id, flattened_range):
        if not pieces:
            unused = torch.zeros(example.chunk, dtype=tensor.dtype, device=tensor.device)
            replica = replica_id if isinstance(replica_id, tuple) else (replica_id,)
            at = (0,) * len(example.chunk)
            return [_chunk(name_of(example, key), unused, example, at, (*replica, 1), outer)]
        return [
            _chunk(name_of(piece, key), part, piece, index, replica_id, outer)
            for piece in pieces
            for index, part in _parts(piece, tensor)
        ]

    def name_of(piece: Piece, key: str) -> str:
        return f"{key}.{piece.tensor.name.split('.')[1]}" if len(of_first_rank) > 1 else key

    @torch.no_grad()
    def merge(parts):
        merged, parts = torch.zeros(shape, dtype=parts[0].dtype, device=parts[0].device), iter(parts)
        for piece in pieces:
            for _, place in _parts(piece, merged):
                place.copy_(next(parts))
        return merged

    return ShardedTensorFactory(whole.key, whole.data, build, merge, whole.replica_id)


def _parts(piece: Piece, parameter: torch.Tensor):
    """Yield (index among the true tensor's chunks, view of the parameter) for each chunk of the piece."""
    counts = [range(length // size) for length, size in zip(piece.shape, piece.chunk)]
    for at in product(*counts):
        part = piece.view(parameter)
        for dim, (i, size) in enumerate(zip(at, piece.chunk)):
            part = part.narrow(dim, i * size, size)
        yield tuple(start // size + i for start, size, i in zip(piece.offset, piece.chunk, at)), part


def _chunk(key: str, data: torch.Tensor, piece: Piece, index, replica_id, outer) -> ShardedTensor:
    counts = [total // size for total, size in zip(piece.tensor.shape, piece.chunk)]
    offsets = [(len(outer) + dim, i, count) for dim, (i, count) in enumerate(zip(index, counts))]
    return ShardedTensor.from_rank_offsets(
        key, data, *outer, *offsets, replica_id=replica_id, prepend_axis_num=len(outer)
    )
