"""conv_gates in Triton: launches and autograd. Every sum has a fixed order."""

import torch
import triton

from ..opaque import opaque
from ..slices import from_next, from_previous
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


def _constants(dims: list[int], width: int, varlen: bool) -> dict:
    key_heads, heads, dim_k, dim_v = dims
    tile = next(t for t in (64, 32, 16) if heads * dim_v % t == 0)
    return dict(
        W=width, HK=key_heads, HV=heads, K=dim_k, V=dim_v, VT=tile, HEADS_POW2=triton.next_power_of_2(heads),
        VARLEN=varlen,
    )  # fmt: skip


def _units(c: dict, of_values: int) -> int:
    """Programs side by side: a key or query head each, a tile of values each, `of_values` times over, and one for a and b."""
    return 2 * c["HK"] + of_values * (c["HV"] * c["V"] // c["VT"]) + 1


def _forward_like(packed, weight, A_log, dt_bias, positions, dims, beta_max):
    length, batch, _ = packed.shape
    heads, values, dim_k, dim_v = dims
    q, k = (packed.new_empty(batch, length, heads, dim_k) for _ in range(2))
    v = packed.new_empty(batch, length, values, dim_v)
    g, beta = (packed.new_empty(batch, length, values, dtype=torch.float32) for _ in range(2))
    return [q, k, v, g, beta]


@opaque("conv_gates_forward", _forward_like)
def _forward(
    packed: torch.Tensor, weight: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor,
    positions: torch.Tensor | None, dims: list[int], beta_max: float,
) -> list[torch.Tensor]:  # fmt: skip
    """q, k, v, g, beta. dims: key heads, value heads, key head dim, value head dim."""
    length, batch, width = packed.shape
    out = _forward_like(packed, weight, A_log, dt_bias, positions, dims, beta_max)
    c = _constants(dims, width, positions is not None)
    conv_gates_kernel[(_units(c, 1), triton.cdiv(length, SEGMENTS * FORWARD_SEGMENT), batch)](
        packed, weight, A_log, dt_bias, packed if positions is None else positions, *out, length, batch, beta_max, **c,
        S=SEGMENTS, L=FORWARD_SEGMENT, num_warps=4,
    )  # fmt: skip
    return out


def _backward_like(packed, weight, A_log, dt_bias, positions, dq, dk, dv, dg, dbeta, dgate, dims, beta_max):
    return [torch.empty_like(packed), torch.empty_like(weight), A_log.new_empty(2, dims[1], dtype=torch.float32)]


@opaque("conv_gates_backward", _backward_like)
def _backward(
    packed: torch.Tensor, weight: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor,
    positions: torch.Tensor | None, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, dg: torch.Tensor,
    dbeta: torch.Tensor, dgate: torch.Tensor | None, dims: list[int], beta_max: float,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of packed, weight, and [2, HV] of A_log and dt_bias."""
    length, batch, width = packed.shape
    c = _constants(dims, width, positions is not None)
    blocks = triton.cdiv(length, SEGMENTS * BACKWARD_SEGMENT)
    dpacked = torch.empty_like(packed)
    dweight = torch.empty(blocks * batch, *weight.shape, device=weight.device, dtype=torch.float32)
    sums = torch.empty(blocks * batch, 2, c["HV"], device=weight.device, dtype=torch.float32)
    gate = packed if dgate is None else dgate.contiguous()
    conv_gates_backward_kernel[(_units(c, 2), blocks, batch)](
        packed, weight, A_log, dt_bias, packed if positions is None else positions, dq, dk, dv, dg, dbeta, gate, dpacked,
        dweight, sums, length, batch, beta_max, **c, WITH_GATE=dgate is not None, S=SEGMENTS, L=BACKWARD_SEGMENT,
        num_warps=4,
    )  # fmt: skip
    return [dpacked, dweight.sum(0).to(weight.dtype), sums.sum(0)]


# Slices on several ranks: the kernels take a slice as a sequence, which is wrong for its first BACK tokens alone. They run once
# more on these and as many before them, and both times what is wrong is left out. No token of the rest is copied.

BACK = 3  # taps - 1


def _correct_start(packed, weight, A_log, dt_bias, out, dims, beta_max, group) -> torch.Tensor:
    """Write the first tokens of q, k and v anew. Returns [2 * BACK, b, W]: the end of the slice before, this one's start."""
    start = torch.cat((from_previous(packed[-BACK:], group), packed[:BACK]))
    for x, right in zip(out[:3], _forward(start, weight, A_log, dt_bias, None, dims, beta_max)):
        x[:, :BACK] = right[:, BACK:]
    return start


def _backward_of_slice(
    packed, weight, A_log, dt_bias, start, given, dgate, dims, beta_max, group
) -> list[torch.Tensor]:
    """As `_backward`; the gradient of the slice before's last tokens travels to their rank."""
    dqkv = [x[:, :BACK].clone() for x in given[:3]]
    for x in given[:3]:
        x[:, :BACK] = 0
    dpacked, dweight, dgates = _backward(packed, weight, A_log, dt_bias, None, *given, dgate, dims, beta_max)
    for x, part in zip(given[:3], dqkv):  # others may hold it
        x[:, :BACK] = part
    zeros = [x.new_zeros(x.shape[0], 2 * BACK, *x.shape[2:]) for x in given]
    for x, part in zip(zeros[:3], dqkv):
        x[:, BACK:] = part
    dstart, more, _ = _backward(start, weight, A_log, dt_bias, None, *zeros, None, dims, beta_max)
    dpacked[:BACK] += dstart[BACK:]
    dpacked[-BACK:] += from_next(dstart[:BACK], group)
    return [dpacked, dweight + more, dgates]


class ConvGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, weight, A_log, dt_bias, cu_seqlens, dims, beta_max, return_gate, group):
        packed, weight = packed.contiguous(), weight.contiguous()
        positions = None
        if cu_seqlens is not None:
            positions = position_in_document(packed.shape[0], cu_seqlens, packed.device).to(torch.int32)
        out = _forward(packed, weight, A_log, dt_bias, positions, dims, beta_max)
        start = None
        if group is not None:
            start = _correct_start(packed, weight, A_log, dt_bias, out, dims, beta_max, group)
        ctx.save_for_backward(packed, weight, A_log, dt_bias, positions, start)
        ctx.dims, ctx.beta_max, ctx.group = dims, beta_max, group
        if return_gate:
            sizes = widths(*dims)
            out = [*out, packed[..., sum(sizes[:3]) : sum(sizes[:4])]]
        return tuple(out)

    @staticmethod
    def backward(ctx, dq, dk, dv, dg, dbeta, dgate=None):
        packed, weight, A_log, dt_bias, positions, start = ctx.saved_tensors
        given = [x.contiguous() for x in (dq, dk, dv, dg, dbeta)]
        tensors, sizes = (packed, weight, A_log, dt_bias), (ctx.dims, ctx.beta_max)
        if ctx.group is None:
            dpacked, dweight, gates = _backward(*tensors, positions, *given, dgate, *sizes)
        else:
            dpacked, dweight, gates = _backward_of_slice(*tensors, start, given, dgate, *sizes, ctx.group)
        return dpacked, dweight, gates[0].to(A_log.dtype), gates[1].to(dt_bias.dtype), *(None,) * 5


def conv_gates_triton(
    packed, weight, A_log, dt_bias, *, num_key_heads, num_value_heads, key_head_dim, value_head_dim,
    allow_negative_eigenvalues=True, cu_seqlens=None, return_gate=False, group=None,
):  # fmt: skip
    """Arguments and results: `conv_gates`."""
    dims = [num_key_heads, num_value_heads, key_head_dim, value_head_dim]
    beta_max = 2.0 if allow_negative_eigenvalues else 1.0
    run = ConvGates.apply if group is None else _between_ranks
    return run(packed, weight, A_log, dt_bias, cu_seqlens, dims, beta_max, return_gate, group)


@torch.compiler.disable(reason="a process group is no argument of an operator")
def _between_ranks(*args):
    return ConvGates.apply(*args)
