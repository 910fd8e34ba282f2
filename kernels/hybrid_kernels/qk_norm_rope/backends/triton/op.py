"""Launches and autograd of `qk_norm_rope` in Triton. Every sum has a fixed order.

Without other ranks, each direction is one launch. Ranks that share the heads launch the kernel's first half (SUMS), all-reduce
one number per token for q and one for k, and launch the second half (REST).
"""

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from hybrid_kernels import triton_support  # noqa: F401 - repairs Triton's interpreter before the kernels are defined
from hybrid_kernels.collectives import AllReduce
from hybrid_kernels.custom_op import OptionalTensors, custom_op, eager_only
from hybrid_kernels.qk_norm_rope.backends.triton import kernels
from hybrid_kernels.qk_norm_rope.backends.triton.kernels import backward_kernel, forward_kernel

ALONE, SUMS, REST = (x.value for x in (kernels.ALONE, kernels.SUMS, kernels.REST))
WARPS = 4
BACKWARD_PROGRAMS = 132 * 2
"""Programs for each of q, k and v. Each sums the gradient of the weight over its tokens."""


def _constants(q_weight: torch.Tensor, head_dim: int, angles: torch.Tensor | None) -> dict[str, Any]:
    return dict(
        HEADS2=triton.next_power_of_2(len(q_weight) // head_dim), D=head_dim,
        HALF2=triton.next_power_of_2(head_dim // 2), ROTARY=angles is not None,
    )  # fmt: skip


def _tokens_per_angles(batch: int, angles: torch.Tensor | None) -> int:
    """Return how many consecutive tokens of [s, b] share a row of angles."""
    return 1 if angles is None else batch // angles.shape[1]


def _heads_of(q_weight: torch.Tensor, k_weight: torch.Tensor, head_dim: int) -> tuple[int, int]:
    return len(q_weight) // head_dim, len(k_weight) // head_dim


def _squares_like(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor | None, head_dim: int,
    widths: list[int], eps: float,
) -> list[torch.Tensor]:  # fmt: skip
    return [torch.empty(qkv.shape[0] * qkv.shape[1], 2, device=qkv.device, dtype=torch.float32)]


@custom_op("qk_norm_rope_squares", _squares_like)
def _squares(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor | None, head_dim: int,
    widths: list[int], eps: float,
) -> OptionalTensors:  # fmt: skip
    """Return the sums of squares [tokens, 2] of this rank's q and k."""
    (squares,) = _squares_like(qkv, q_weight, k_weight, angles, head_dim, widths, eps)
    _launch_forward(qkv, q_weight, k_weight, angles, squares, [qkv] * 3, head_dim, widths, eps, 2, SUMS)
    return [squares]


def _forward_like(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor | None,
    squares: torch.Tensor | None, head_dim: int, widths: list[int], eps: float,
) -> OptionalTensors:  # fmt: skip
    length, batch, _ = qkv.shape
    heads, groups = _heads_of(q_weight, k_weight, head_dim)
    q = qkv.new_empty(length, batch, heads, head_dim)
    k, v = (qkv.new_empty(length, batch, groups, head_dim) for _ in range(2))
    (own,) = _squares_like(qkv, q_weight, k_weight, angles, head_dim, widths, eps) if squares is None else (None,)
    return [q, k, v, own]


@custom_op("qk_norm_rope_forward", _forward_like)
def _forward(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor | None,
    squares: torch.Tensor | None, head_dim: int, widths: list[int], eps: float,
) -> OptionalTensors:  # fmt: skip
    """Return q, k, v and, where `squares` was not given, the sums of squares."""
    *out, own = _forward_like(qkv, q_weight, k_weight, angles, squares, head_dim, widths, eps)
    phase = ALONE if squares is None else REST
    used = own if squares is None else squares
    _launch_forward(qkv, q_weight, k_weight, angles, used, out, head_dim, widths, eps, 3, phase)
    return [*out, own]


def _launch_forward(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor | None,
    squares: torch.Tensor | None, out: OptionalTensors, head_dim: int, widths: list[int], eps: float, parts: int, phase: int,
) -> None:  # fmt: skip
    length, batch, _ = qkv.shape
    forward_kernel[(length * batch, parts)](
        qkv, q_weight, k_weight, qkv if angles is None else angles, squares, *out,
        _tokens_per_angles(batch, angles), *_heads_of(q_weight, k_weight, head_dim), *widths, eps,
        **_constants(q_weight, head_dim, angles), PHASE=phase, num_warps=WARPS,
    )  # fmt: skip


def _along_like(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor | None, squares: torch.Tensor,
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, head_dim: int, widths: list[int], eps: float,
) -> list[torch.Tensor]:  # fmt: skip
    return [torch.empty_like(squares)]


@custom_op("qk_norm_rope_along", _along_like)
def _along(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor | None, squares: torch.Tensor,
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, head_dim: int, widths: list[int], eps: float,
) -> OptionalTensors:  # fmt: skip
    """Return the components [tokens, 2] of this rank's gradients along normalised q and k."""
    along = torch.empty_like(squares)
    _launch_backward(
        qkv, q_weight, k_weight, angles, squares, [dq, dk, dv], along, qkv, squares, head_dim, widths, eps, 2, SUMS
    )
    return [along]


def _backward_like(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor | None, squares: torch.Tensor,
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, along: torch.Tensor | None, head_dim: int, widths: list[int],
    eps: float,
) -> list[torch.Tensor]:  # fmt: skip
    return [torch.empty_like(qkv), q_weight.new_empty(len(q_weight) + len(k_weight))]


@custom_op("qk_norm_rope_backward", _backward_like)
def _backward(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor | None, squares: torch.Tensor,
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, along: torch.Tensor | None, head_dim: int, widths: list[int],
    eps: float,
) -> OptionalTensors:  # fmt: skip
    """Return the gradients of qkv and of both weights, one after the other. `along`: summed over the ranks; None: no others."""
    dqkv = torch.empty_like(qkv)
    dweights = squares.new_empty(_backward_programs(squares), len(q_weight) + len(k_weight))
    phase, onto = (ALONE, squares) if along is None else (REST, along)
    _launch_backward(
        qkv, q_weight, k_weight, angles, squares, [dq, dk, dv], onto, dqkv, dweights, head_dim, widths, eps, 3, phase
    )
    return [dqkv, dweights.sum(0).to(q_weight.dtype)]


def _backward_programs(squares: torch.Tensor) -> int:
    return min(BACKWARD_PROGRAMS, len(squares))


def _launch_backward(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor | None, squares: torch.Tensor,
    grads: list[torch.Tensor], along: torch.Tensor, dqkv: torch.Tensor, dweights: torch.Tensor, head_dim: int,
    widths: list[int], eps: float, parts: int, phase: int,
) -> None:  # fmt: skip
    strides = [stride for g in grads for stride in g.stride()[:3]]
    backward_kernel[(_backward_programs(squares), parts)](
        qkv, q_weight, k_weight, qkv if angles is None else angles, squares, *grads, along, dqkv, dweights, len(squares),
        qkv.shape[1], _tokens_per_angles(qkv.shape[1], angles), *_heads_of(q_weight, k_weight, head_dim), *strides, *widths, eps,
        **_constants(q_weight, head_dim, angles), PHASE=phase, num_warps=WARPS,
    )  # fmt: skip


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles: torch.Tensor | None,
        head_dim: int, widths: list[int], eps: float, all_reduce: AllReduce | None,
    ) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
        tensors, options = (qkv, q_weight, k_weight, angles), (head_dim, widths, eps)
        squares = None
        if all_reduce is not None:
            (squares,) = _squares(*tensors, *options)
            assert squares is not None
            all_reduce(squares)
        q, k, v, own = _forward(*tensors, squares, *options)
        ctx.save_for_backward(*tensors, own if squares is None else squares)
        ctx.options, ctx.all_reduce = options, all_reduce
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tensors = ctx.saved_tensors
        given = [g if g.stride(-1) == 1 else g.contiguous() for g in grads]
        along = None
        if ctx.all_reduce is not None:
            (along,) = _along(*tensors, *given, *ctx.options)
            assert along is not None
            ctx.all_reduce(along)
        dqkv, dweights = _backward(*tensors, *given, along, *ctx.options)
        assert dweights is not None
        dq_weight, dk_weight = dweights.split([len(tensors[1]), len(tensors[2])])
        return dqkv, dq_weight, dk_weight, None, None, None, None, None


def qk_norm_rope_triton(
    qkv_sbw: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    angles_sb1d: torch.Tensor | None,
    *,
    head_dim: int,
    true_widths: tuple[int, int],
    eps: float,
    all_reduce: AllReduce | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `hybrid_kernels.qk_norm_rope.qk_norm_rope`."""
    angles = None if angles_sb1d is None else angles_sb1d.contiguous()
    tensors = (qkv_sbw.contiguous(), q_weight.contiguous(), k_weight.contiguous(), angles)
    apply = _QKNormRope.apply if all_reduce is None else _apply_eagerly
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = apply(
        *tensors, head_dim, list(true_widths), eps, all_reduce
    )
    return results


@eager_only
def _apply_eagerly(*args: Any) -> Any:
    return _QKNormRope.apply(*args)
