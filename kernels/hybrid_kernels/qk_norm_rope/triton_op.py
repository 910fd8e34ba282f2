"""qk_norm_rope in Triton: launches, the sums over ranks between them, and autograd. Every sum has a fixed order."""

import torch
import torch.distributed as dist
import triton

from .. import triton_support  # noqa: F401 - repairs Triton's interpreter where that is what runs
from . import triton_kernels
from .triton_kernels import backward_kernel, forward_kernel

ALONE, SUMS, REST = (x.value for x in (triton_kernels.ALONE, triton_kernels.SUMS, triton_kernels.REST))
WARPS = 4
BACKWARD_PROGRAMS = 132 * 2  # for each of q, k, v; each adds up the weight's gradient over its tokens


def _halves(launch, sums: torch.Tensor, group) -> None:
    """Run a direction's kernel: in one go, or in two halves with `sums` added up over the ranks between them."""
    if group is None or group.size() == 1:
        return launch(3, ALONE)
    launch(2, SUMS)
    dist.all_reduce(sums, group=group)
    launch(3, REST)


def _constants(q_weight, head_dim: int, angles) -> dict:
    return dict(
        HEADS2=triton.next_power_of_2(len(q_weight) // head_dim), D=head_dim,
        HALF2=triton.next_power_of_2(head_dim // 2), ROTARY=angles is not None,
    )  # fmt: skip


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, angles, head_dim, widths, eps, group):
        length, batch, _ = qkv.shape
        heads, groups = len(q_weight) // head_dim, len(k_weight) // head_dim
        q = qkv.new_empty(length, batch, heads, head_dim)
        k, v = (qkv.new_empty(length, batch, groups, head_dim) for _ in range(2))
        squares = torch.empty(length * batch, 2, device=qkv.device, dtype=torch.float32)
        constants = _constants(q_weight, head_dim, angles)

        def launch(parts, phase):
            forward_kernel[(length * batch, parts)](
                qkv, q_weight, k_weight, qkv if angles is None else angles, squares, q, k, v, batch, heads, groups,
                *widths, eps, **constants, PHASE=phase, num_warps=WARPS,
            )  # fmt: skip

        _halves(launch, squares, group)
        ctx.save_for_backward(qkv, q_weight, k_weight, angles, squares)
        ctx.options = heads, groups, widths, eps, group, constants
        return q, k, v

    @staticmethod
    def backward(ctx, *grads):
        qkv, q_weight, k_weight, angles, squares = ctx.saved_tensors
        heads, groups, widths, eps, group, constants = ctx.options
        grads = [g if g.stride(-1) == 1 else g.contiguous() for g in grads]
        strides = [stride for g in grads for stride in g.stride()[:3]]
        tokens, batch = len(squares), qkv.shape[1]
        programs = min(BACKWARD_PROGRAMS, tokens)
        dqkv, along = torch.empty_like(qkv), torch.empty_like(squares)
        dweights = squares.new_empty(programs, len(q_weight) + len(k_weight))

        def launch(parts, phase):
            backward_kernel[(programs, parts)](
                qkv, q_weight, k_weight, qkv if angles is None else angles, squares, *grads, along, dqkv, dweights,
                tokens, batch, heads, groups, *strides, *widths, eps, **constants, PHASE=phase,
                num_warps=WARPS,
            )  # fmt: skip

        _halves(launch, along, group)
        dq_weight, dk_weight = dweights.sum(0).to(q_weight.dtype).split([len(q_weight), len(k_weight)])
        return dqkv, dq_weight, dk_weight, None, None, None, None, None


def qk_norm_rope_triton(qkv_sbw, q_weight, k_weight, angles_s11d, *, head_dim, true_widths, eps, group=None):
    """Arguments and results: `qk_norm_rope`."""
    angles = None if angles_s11d is None else angles_s11d.contiguous()
    packed, weights = qkv_sbw.contiguous(), (q_weight.contiguous(), k_weight.contiguous())
    return _QKNormRope.apply(packed, *weights, angles, head_dim, tuple(true_widths), eps, group)
