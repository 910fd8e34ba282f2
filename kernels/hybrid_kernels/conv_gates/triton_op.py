"""conv_gates in Triton: launches and autograd. Every sum has a fixed order."""

import torch
import triton

from .reference import position_in_document, widths
from .triton_backward import conv_gates_backward_kernel
from .triton_forward import conv_gates_kernel

SEGMENTS, FORWARD_SEGMENT, BACKWARD_SEGMENT = 8, 32, 64  # what a program walks: so many segments of so many tokens


def missing(taps, num_value_heads, key_head_dim, value_head_dim) -> str | None:
    """What these kernels lack for such shapes, or None."""
    if taps != 4:
        return f"the convolution has {taps} taps, not 4"
    if key_head_dim not in (16, 32, 64, 96, 128, 192, 256):
        return f"key_head_dim {key_head_dim} is none of 16, 32, 64, 96, 128, 192, 256"
    if num_value_heads * value_head_dim % 16:
        return f"num_value_heads * value_head_dim = {num_value_heads * value_head_dim} is not a multiple of 16"
    return None


def _constants(dims: dict, width: int, varlen: bool) -> dict:
    channels = dims["num_value_heads"] * dims["value_head_dim"]
    tile = next(t for t in (64, 32, 16) if channels % t == 0)
    return dict(
        W=width, HK=dims["num_key_heads"], HV=dims["num_value_heads"], K=dims["key_head_dim"],
        V=dims["value_head_dim"], VT=tile, HEADS_POW2=triton.next_power_of_2(dims["num_value_heads"]), VARLEN=varlen,
    )  # fmt: skip


def _units(c: dict) -> int:
    return 2 * c["HK"] + c["HV"] * c["V"] // c["VT"] + 1


class ConvGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, weight, A_log, dt_bias, cu_seqlens, dims, beta_max, return_gate):
        packed, weight = packed.contiguous(), weight.contiguous()
        length, batch, width = packed.shape
        c = _constants(dims, width, cu_seqlens is not None)
        positions = packed
        if cu_seqlens is not None:
            positions = position_in_document(length, cu_seqlens, packed.device).to(torch.int32)
        q, k = (packed.new_empty(batch, length, c["HK"], c["K"]) for _ in range(2))
        v = packed.new_empty(batch, length, c["HV"], c["V"])
        g, beta = (packed.new_empty(batch, length, c["HV"], dtype=torch.float32) for _ in range(2))
        conv_gates_kernel[(_units(c), triton.cdiv(length, SEGMENTS * FORWARD_SEGMENT), batch)](
            packed, weight, A_log, dt_bias, positions, q, k, v, g, beta, length, batch, beta_max, **c,
            S=SEGMENTS, L=FORWARD_SEGMENT, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(packed, weight, A_log, dt_bias, positions)
        ctx.constants, ctx.beta_max, ctx.sizes = c, beta_max, widths(**dims)
        if not return_gate:
            return q, k, v, g, beta
        start = sum(ctx.sizes[:3])
        return q, k, v, g, beta, packed[..., start : start + ctx.sizes[3]]

    @staticmethod
    def backward(ctx, dq, dk, dv, dg, dbeta, dgate=None):
        packed, weight, A_log, dt_bias, positions = ctx.saved_tensors
        c, (length, batch, _) = ctx.constants, packed.shape
        dq, dk, dv, dg, dbeta = (x.contiguous() for x in (dq, dk, dv, dg, dbeta))
        blocks = triton.cdiv(length, SEGMENTS * BACKWARD_SEGMENT)
        dpacked = torch.empty_like(packed)
        dweight = torch.empty(blocks * batch, *weight.shape, device=weight.device, dtype=torch.float32)
        sums = torch.empty(blocks * batch, 2, c["HV"], device=weight.device, dtype=torch.float32)
        conv_gates_backward_kernel[(_units(c), blocks, batch)](
            packed, weight, A_log, dt_bias, positions, dq, dk, dv, dg, dbeta, dpacked, dweight, sums, length, batch,
            ctx.beta_max, **c, S=SEGMENTS, L=BACKWARD_SEGMENT, num_warps=4,
        )  # fmt: skip
        gate_at, used = sum(ctx.sizes[:3]), sum(ctx.sizes)
        gate = dpacked[..., gate_at : gate_at + ctx.sizes[3]]
        gate.zero_() if dgate is None else gate.copy_(dgate)
        dpacked[..., used:].zero_()
        dA_log, ddt_bias = sums.sum(0)
        dweight = dweight.sum(0).to(weight.dtype)
        return dpacked, dweight, dA_log.to(A_log.dtype), ddt_bias.to(dt_bias.dtype), None, None, None, None


def conv_gates_triton(
    packed, weight, A_log, dt_bias, *, allow_negative_eigenvalues=True, cu_seqlens=None, return_gate=False, **dims
):
    """Arguments and results: `conv_gates`."""
    beta_max = 2.0 if allow_negative_eigenvalues else 1.0
    return ConvGates.apply(packed, weight, A_log, dt_bias, cu_seqlens, dims, beta_max, return_gate)
