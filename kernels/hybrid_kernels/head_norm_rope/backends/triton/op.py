"""Launches and autograd of `head_norm_rope` in Triton. Every sum has a fixed order."""

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from hybrid_kernels import triton_support  # noqa: F401 - repairs Triton's interpreter before the kernels are defined
from hybrid_kernels.custom_op import OptionalTensors, custom_op
from hybrid_kernels.head_norm_rope.backends.triton.kernels import backward_kernel, forward_kernel

ROWS, WARPS = 4, 4
BACKWARD_PROGRAMS = 132 * 4
"""Programs for each block of ROWS heads. Each sums the gradient of the weight over its tokens."""


def _constants(weight: torch.Tensor, angles: torch.Tensor | None) -> dict[str, Any]:
    d = len(weight)
    return dict(D=d, D2=triton.next_power_of_2(d), ROWS=ROWS, R=0 if angles is None else angles.shape[-1])


def _blocks(heads: list[int]) -> tuple[int, int]:
    """Return the blocks of q and of k."""
    return triton.cdiv(heads[0], ROWS), triton.cdiv(heads[1], ROWS)


def _tokens_per_angles(batch: int, angles: torch.Tensor | None) -> int:
    """Return how many consecutive tokens of [s, b] share a row of angles."""
    return 1 if angles is None else batch // angles.shape[1]


def _forward_like(
    packed: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor | None, heads: list[int],
    eps: float,
) -> list[torch.Tensor]:  # fmt: skip
    shape, d = packed.shape[:2], len(q_weight)
    return [packed.new_empty(*shape, n, d) for n in (heads[0], heads[1], heads[1])]


@custom_op("head_norm_rope_forward", _forward_like)
def _forward(
    packed: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor | None, heads: list[int],
    eps: float,
) -> OptionalTensors:  # fmt: skip
    """Return q, k and v."""
    out = _forward_like(packed, q_weight, k_weight, angles, heads, eps)
    length, batch, width = packed.shape
    q_blocks, k_blocks = _blocks(heads)
    forward_kernel[(length * batch, q_blocks + 2 * k_blocks)](
        packed, q_weight, k_weight, packed if angles is None else angles, *out, width,
        _tokens_per_angles(batch, angles), *heads, eps, **_constants(q_weight, angles), num_warps=WARPS,
    )  # fmt: skip
    return [*out]


def _backward_like(
    packed: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor | None, dq: torch.Tensor,
    dk: torch.Tensor, dv: torch.Tensor, dgate: torch.Tensor | None, heads: list[int], eps: float,
) -> list[torch.Tensor]:  # fmt: skip
    return [torch.empty_like(packed), torch.empty_like(q_weight), torch.empty_like(k_weight)]


@custom_op("head_norm_rope_backward", _backward_like)
def _backward(
    packed: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor | None, dq: torch.Tensor,
    dk: torch.Tensor, dv: torch.Tensor, dgate: torch.Tensor | None, heads: list[int], eps: float,
) -> OptionalTensors:  # fmt: skip
    """Return the gradients of packed and of both weights."""
    length, batch, width = packed.shape
    q_blocks, k_blocks = _blocks(heads)
    programs = min(BACKWARD_PROGRAMS, length * batch)
    dpacked = torch.empty_like(packed)
    dweights = packed.new_empty(programs, q_blocks + k_blocks, len(q_weight), dtype=torch.float32)
    strides = [stride for g in (dq, dk, dv) for stride in g.stride()[:3]]
    gate, gate_blocks = (dq, 0) if dgate is None else (dgate, q_blocks)
    backward_kernel[(programs, q_blocks + 2 * k_blocks + gate_blocks)](
        packed, q_weight, k_weight, packed if angles is None else angles, dq, dk, dv, gate, dpacked, dweights,
        length * batch, batch, width, _tokens_per_angles(batch, angles), *heads, *strides, *gate.stride()[:2], eps,
        **_constants(q_weight, angles), num_warps=WARPS,
    )  # fmt: skip
    sums = dweights.sum(0)
    return [dpacked, sums[:q_blocks].sum(0).to(q_weight.dtype), sums[q_blocks:].sum(0).to(k_weight.dtype)]


class _HeadNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, packed: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor | None,
        heads: list[int], eps: float, gated: bool,
    ) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
        tensors = (packed, q_weight, k_weight, angles)
        q, k, v = _forward(*tensors, heads, eps)
        ctx.save_for_backward(*tensors)
        ctx.options = heads, eps
        return (q, k, v, packed[..., (heads[0] + 2 * heads[1]) * len(q_weight) :]) if gated else (q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        given = [g if g.stride(-1) == 1 else g.contiguous() for g in grads]
        dgate = given[3] if len(given) > 3 else None
        return *_backward(*ctx.saved_tensors, *given[:3], dgate, *ctx.options), None, None, None, None


def head_norm_rope_triton(
    packed_sbw: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    angles_sb1r: torch.Tensor | None,
    *,
    num_heads: int,
    num_groups: int,
    eps: float,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See `hybrid_kernels.head_norm_rope.head_norm_rope`."""
    angles = None if angles_sb1r is None else angles_sb1r.contiguous()
    tensors = (packed_sbw.contiguous(), q_weight.contiguous(), k_weight.contiguous(), angles)
    q, k, v, *gate = _HeadNormRope.apply(*tensors, [num_heads, num_groups], eps, gated)
    return q, k, v, gate[0] if gate else None
