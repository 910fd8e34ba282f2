"""Context parallelism of the KDA rule: ranks exchange states, as those of the gated delta rule do (distributed/state_passing.py).

The transition of a slice is a matrix [K, K], whatever decays it is made of. A first scan finds it with the slice's final state.
"""

from typing import Any

import torch
import torch.distributed as dist

from hybrid_kernels.dispatch import Choice
from hybrid_kernels.kda_rule import explain, final_state_and_transition, kda_rule
from megatron_hybrid.distributed.state_passing import differentiable_state_before, in_slices


def kda_rule_of_slices(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    group: dist.ProcessGroup,
    positions_bs: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
    **gate: Any,
) -> torch.Tensor:
    """Return o of `kda_rule` for this rank's slice of every sequence. Differentiable.

    Args:
        group: ranks that hold one slice each of every sequence, in rank order.
        positions_bs: position of each token of the slice in its document, which may have begun in a slice before.
        cu_seqlens: bounds of the same documents in whole rows. A group of several ranks does not use them.
        gate: arguments of `kda_rule` that compute the log decay of g.

    Raises:
        ValueError: the shapes do not match, or the requested backend cannot run here.
    """
    if group.size() == 1:
        return kda_rule(q, k, v, g, beta, positions_bs=positions_bs, cu_seqlens=cu_seqlens, backend=backend, **gate)[0]
    choice = explain(k, v, documents=positions_bs is not None, states=True, backend=backend)
    options: dict[str, Any] = dict(positions_bs=positions_bs, backend=choice.backend, **gate)
    ends = final_state_and_transition(k, v, g, beta, **options)
    initial = differentiable_state_before(ends, v.shape[-1], group)
    return kda_rule(q, k, v, g, beta, initial_state=initial, **options)[0]


def explain_kda_rule_of_slices(
    k: torch.Tensor, v: torch.Tensor, *, group: dist.ProcessGroup, documents: bool = False
) -> Choice:
    """Return which backend `kda_rule_of_slices` would run, and why. `documents`: with positions_bs and cu_seqlens."""
    is_whole = group.size() == 1
    return in_slices(explain(k, v, documents=documents, bounds=documents and is_whole, states=not is_whole), group)
