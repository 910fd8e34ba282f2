"""How fast nodes reduce: each node inside, and each node with its neighbours, so that a slow one can be told by name."""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_hybrid.distributed.device import local_device, synchronize

TIMES = 4
"""All-reduces that are timed; the fastest counts."""


def all_reduce_gb_s(sets: Sequence[Sequence[int]], size_bytes: int) -> float | None:
    """Bus bandwidth of an all-reduce inside each of these sets of ranks at once, GB/s: 2 (n - 1) / n times the bytes a second,
    as NCCL's tests count.

    Every rank calls it, also one that is in no set. None for that, and for a set of one. The sets share no rank.
    """
    # not torch's use_local_synchronization: it names a group by a hash of its ranks and of the groups that a rank has so far,
    # which pipeline stages have not in common, and then ranks wait for each other for ever
    created = [dist.new_group(list(ranks)) if len(ranks) > 1 else None for ranks in sets]
    group = next(
        (g for g, ranks in zip(created, sets, strict=True) if g is not None and dist.get_rank() in ranks), None
    )
    if group is None:
        return None
    count = dist.get_world_size(group)
    data = torch.ones(max(size_bytes // 4, 1), device=local_device())
    best = float("inf")
    for _ in range(TIMES + 1):  # the first one makes the connections
        dist.barrier(group)
        synchronize()
        start = time.perf_counter()
        dist.all_reduce(data, group=group)
        synchronize()
        best = min(best, time.perf_counter() - start)
    dist.destroy_process_group(group)
    return 2 * (count - 1) / count * data.nbytes / best / 1e9


def pairings(nodes: int) -> list[list[tuple[int, int]]]:
    """Rounds of pairs of neighbours on a ring of nodes; pairs of a round share no node and run at once.

    Every node is paired with both neighbours: a slow node is slow in each of its pairs, its neighbours in one alone.
    """
    if nodes < 2:
        return []
    if nodes == 2:
        return [[(0, 1)]]
    rounds = [
        [(i, i + 1) for i in range(0, nodes - 1, 2)],
        [(i, (i + 1) % nodes) for i in range(1, nodes - 1 + (nodes % 2 == 0), 2)],
    ]
    return [*rounds, [(nodes - 1, 0)]] if nodes % 2 else rounds


def between_gb_s(ranks_of_nodes: Sequence[Sequence[int]], size_bytes: int) -> float | None:
    """Bus bandwidth of this rank's node with the neighbour that it is faster with; None on one node. Every rank calls it."""
    found = []
    for pairs in pairings(len(ranks_of_nodes)):
        sets = [sorted(rank for node in pair for rank in ranks_of_nodes[node]) for pair in pairs]
        found.append(all_reduce_gb_s(sets, size_bytes))
        dist.barrier()  # rounds must not overlap
    return max((value for value in found if value is not None), default=None)
