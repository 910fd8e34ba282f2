"""Collectives of tensor parallel groups, bound to a group in the form that `hybrid_kernels` takes."""

from functools import partial

import torch.distributed as dist

from hybrid_kernels.collectives import AllReduce, VocabParallel


def all_reduce_sum(group: dist.ProcessGroup) -> AllReduce | None:
    """Return the in-place sum over the ranks of a group; None for a group of one rank."""
    return None if group.size() == 1 else partial(dist.all_reduce, group=group)


def vocab_parallel(group: dist.ProcessGroup) -> VocabParallel | None:
    """Return this rank's position among the ranks that share the vocabulary; None for a group of one rank."""
    if group.size() == 1:
        return None
    return VocabParallel(
        rank=group.rank(),
        size=group.size(),
        all_reduce_sum=partial(dist.all_reduce, group=group),
        all_reduce_max=partial(dist.all_reduce, op=dist.ReduceOp.MAX, group=group),
        all_gather=partial(dist.all_gather_into_tensor, group=group),
    )
