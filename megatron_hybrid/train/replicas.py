"""Comparison of data parallel replicas, whose parameters and gradient norms are equal bit for bit unless something is damaged."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_hybrid.base.errors import REQUEUE, UserError
from megatron_hybrid.distributed.device import local_device, node_name
from megatron_hybrid.precision.fp8_parameters import is_fp8_param, stored_values

_MOST_RANKS = 8
"""Ranks to name one by one."""
_AGAIN = (
    "Nothing was saved since; the run resumes from its last checkpoint when it is started again. If it happens again on the same "
    "host, exclude the host"
)


class ReplicaError(UserError):
    """Data parallel ranks differ in what must be equal."""

    status = REQUEUE


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor's bits, taken as integers. A change of any single value changes it."""
    values = (stored_values(tensor) if is_fp8_param(tensor) else tensor.detach()).contiguous().view(-1)
    even = values.numel() * values.element_size() % 4 == 0
    return values.view(torch.int32 if even else torch.uint8).sum(dtype=torch.int64)


@torch.no_grad()
def check_parameters(named: Sequence[tuple[str, torch.Tensor]], group: dist.ProcessGroup, step: int) -> None:
    """Check that the ranks of `group` hold equal parameters. Every rank of the world calls it.

    It reads the parameters once on the device, reduces 16 bytes per parameter over the group, and waits for the result.

    Raises:
        ReplicaError: on every rank; names the ranks and the first tensor that differ.
    """
    sums = torch.stack([checksum(tensor) for _, tensor in named])
    bounds = torch.stack((sums, -sums))
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    differs = (bounds[0] != -bounds[1]).any().to(torch.int32)
    dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    if not differs.item():
        return
    bad = (bounds[0] != -bounds[1]).nonzero().view(-1).tolist()
    mine = (named[bad[0]][0], len(bad), int(sums[bad[0]])) if bad else None
    names, (tensor, count) = _all_different(mine, group)
    raise ReplicaError(
        f"data parallel ranks hold different values in {tensor} (the first of {count} tensors) after step {step}: {names}. "
        f"{_AGAIN}"
    )


def agreed_norm(norm: float, group: dist.ProcessGroup) -> float:
    """Return a gradient norm that the ranks of `group` have computed from equal gradients.

    Returns:
        The norm; on all ranks NaN or infinity if it is so on any of them.

    Raises:
        ReplicaError: on every rank of the group; names the ranks whose norm differs.
    """
    finite = norm if math.isfinite(norm) else 0.0
    flags = [math.isnan(norm), math.isinf(norm), finite, -finite]
    # fp32 would not distinguish all norms
    largest = torch.tensor(flags, dtype=torch.float64, device=local_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    any_nan, any_inf, most, least = largest.tolist()
    if any_nan or any_inf:
        return math.nan if any_nan else math.inf
    if most != -least:
        names, _ = _different(_gathered(("", 1, norm), group))
        raise ReplicaError(f"data parallel ranks have different gradient norms after the reduction: {names}. {_AGAIN}")
    return norm


Value = tuple[str, int, float]
"""Name of a tensor, number of tensors that differ, value to compare."""


def _gathered(mine: Value | None, group: dist.ProcessGroup) -> list[tuple[int, str, Value | None]]:
    """Return (rank, host, value) of all ranks of a group."""
    found: list[tuple[int, str, Value | None]] = [(0, "", None)] * group.size()
    dist.all_gather_object(found, (dist.get_rank(), node_name(), mine), group=group)
    return found


def _all_different(mine: Value | None, group: dist.ProcessGroup) -> tuple[str, tuple[str, int]]:
    """Compare within each group, and return the result of the first group with a difference to all ranks of the world."""
    in_group = _gathered(mine, group)
    result = _different(in_group) if mine is not None else None
    results: list[tuple[str, tuple[str, int]] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(results, result)
    return next(result for result in results if result is not None)


def _different(found: list[tuple[int, str, Value | None]]) -> tuple[str, tuple[str, int]]:
    """Name the ranks whose value is not the most frequent one, and the tensor."""
    values = {rank: value for rank, _, value in found if value is not None}
    hosts = {rank: host for rank, host, _ in found}
    ((usual, count),) = Counter(value[2] for value in values.values()).most_common(1)
    odd = [rank for rank, value in values.items() if value[2] != usual] if count > 1 else sorted(values)
    shown = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in odd[:_MOST_RANKS])
    more = f" and {len(odd) - _MOST_RANKS} more" if len(odd) > _MOST_RANKS else ""
    tensor, tensors, _ = values[odd[0]]
    how = (
        "differ from each other"
        if count == 1
        else "differs from the others"
        if len(odd) == 1
        else "differ from the others"
    )
    return f"{shown}{more} {how}", (tensor, tensors)
