"""All-reduce bandwidth inside each node and between neighbouring nodes, which identifies slow nodes."""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_hybrid.distributed.device import local_device, synchronize

TIMES = 4
"""Number of timed all-reduces, of which the fastest counts."""


def all_reduce_gb_s(sets: Sequence[Sequence[int]], size_bytes: int) -> float | None:
    """Return the bus bandwidth of simultaneous all-reduces inside disjoint sets of ranks, in GB/s.

    As in NCCL's tests, it is 2 (n - 1) / n times bytes per second. Every rank calls this function. The result is None on ranks in
    no set and in a set of one rank.
    """
    # not torch's use_local_synchronization: it names a group by a hash of its ranks and of the rank's earlier groups, which differ
    # between pipeline stages, and the ranks would wait for each other forever
    created = [dist.new_group(list(ranks)) if len(ranks) > 1 else None for ranks in sets]
    group = next(
        (g for g, ranks in zip(created, sets, strict=True) if g is not None and dist.get_rank() in ranks), None
    )
    if group is None:
        return None
    count = dist.get_world_size(group)
    data = torch.ones(max(size_bytes // 4, 1), device=local_device())
    best = float("inf")
    for _ in range(TIMES + 1):  # the first one opens the connections
        dist.barrier(group)
        synchronize()
        start = time.perf_counter()
        dist.all_reduce(data, group=group)
        synchronize()
        best = min(best, time.perf_counter() - start)
    dist.destroy_process_group(group)
    return 2 * (count - 1) / count * data.nbytes / best / 1e9


def pairings(nodes: int) -> list[list[tuple[int, int]]]:
    """Return rounds of pairs of neighbours on a ring of nodes. The pairs of a round are disjoint and run at the same time.

    Every node is paired with both neighbours. A slow node is slow in both pairs, its neighbours in one.
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
    """Return the bus bandwidth of this rank's node with its faster neighbour; None for one node. Every rank calls it."""
    found = []
    for pairs in pairings(len(ranks_of_nodes)):
        sets = [sorted(rank for node in pair for rank in ranks_of_nodes[node]) for pair in pairs]
        found.append(all_reduce_gb_s(sets, size_bytes))
        dist.barrier()  # rounds must not overlap
    return max((value for value in found if value is not None), default=None)
