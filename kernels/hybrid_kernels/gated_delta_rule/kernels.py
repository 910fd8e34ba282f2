"""Which kernels run a call of the fast backends."""

from dataclasses import dataclass
from types import ModuleType

import torch

from hybrid_kernels.gated_delta_rule.backends.triton import op as triton_op


@dataclass(frozen=True)
class Kernels:
    """Module that launches `prepare`, the scans and `gradients`, and the number of segments per sequence.

    `join` is Triton's in all backends.
    """

    scans: ModuleType
    segments: int


def choose_kernels(backend: str, q: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None) -> Kernels:
    """Return the kernels of a backend for a call of this shape."""
    module: ModuleType = triton_op
    if backend == "cuda":
        from hybrid_kernels.gated_delta_rule.backends.cuda import op as module
    return Kernels(module, module.segments_of(v, q.shape[3], cu_seqlens))
