"""Which kernels run a call of the fast backends."""

from dataclasses import dataclass
from types import ModuleType

import torch

from hybrid_kernels.gated_delta_rule.backends.triton import op as triton_op


@dataclass(frozen=True)
class Kernels:
    """Modules that launch a call's kernels, and the number of segments per sequence."""

    prepare: ModuleType
    first_scans: ModuleType
    """Scans for final states and transitions alone."""
    scans: ModuleType
    segments: int


def choose_kernels(q: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None, hopper: bool) -> Kernels:
    """Choose kernels by shape and device.

    On Hopper these are kernels in CUDA C++ where they are faster. Their scans have the bits of Gluon's and do not cut sequences.
    """
    segments = triton_op.segments_of(v, q.shape[3], cu_seqlens)
    if not hopper:
        return Kernels(triton_op, triton_op, triton_op, segments)
    from hybrid_kernels.gated_delta_rule.backends.cuda import op as cuda_op
    from hybrid_kernels.gated_delta_rule.backends.gluon import op as gluon_op

    if cuda_op.unsupported_reason(q, v, cu_seqlens) is not None:
        return Kernels(triton_op, gluon_op, gluon_op, segments)
    if cuda_op.slower_scans_reason(q, v) is not None:
        return Kernels(cuda_op, gluon_op, gluon_op, segments)
    return Kernels(cuda_op, gluon_op, cuda_op, 1)
