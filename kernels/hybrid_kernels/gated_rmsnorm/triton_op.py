"""gated_rmsnorm in Triton: one kernel each way, reading o as [b, s, H, d] and gate, y as [s, b, H*d]."""

import torch
import triton
import triton.language as tl

from ..opaque import opaque
from ..triton_support import load_tiles, sigmoid, store_tiles, tile_count, tile_width

FORWARD_ROWS, BACKWARD_ROWS = 32, 16  # rows (a token's head) of one step
BACKWARD_PROGRAMS = 132 * 8  # each adds up the weight's gradient over its rows


def missing(dim: int) -> str | None:
    """What these kernels lack for such a head, or None."""
    sizes = (16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512)
    return None if dim in sizes else f"value_head_dim {dim} is none of {sizes}"


@triton.jit
def _places(row, B, T, H, gate_stride_s, gate_stride_b, D: tl.constexpr):
    """Offsets in o, in gate and in y of rows numbered over [b, s, H]."""
    token, head = row // H, row % H
    b, s = (token // T).to(tl.int64), (token % T).to(tl.int64)
    return row.to(tl.int64) * D, s * gate_stride_s + b * gate_stride_b + head * D, ((s * B + b) * H + head) * D


@triton.jit
def forward_kernel(
    o, gate, weight, y, rows, B, T, H, gate_stride_s, gate_stride_b, eps, D: tl.constexpr, R: tl.constexpr
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    valid = row < rows
    at_o, at_gate, at_y = _places(row, B, T, H, gate_stride_s, gate_stride_b, D)
    o_tiles, gate_tiles = load_tiles(o, at_o, valid, 1, D), load_tiles(gate, at_gate, valid, 1, D)
    square = tl.zeros([R], tl.float32)
    for i in tl.static_range(tile_count(D)):
        x = o_tiles[i].to(tl.float32)
        square += tl.sum(x * x, 1)
    norm = tl.rsqrt(square / D + eps)[:, None]
    out = ()
    for i in tl.static_range(tile_count(D)):
        w = tl.load(weight + 64 * i + tl.arange(0, tile_width(D, i))).to(tl.float32)[None, :]
        z = gate_tiles[i].to(tl.float32)
        out = out + (o_tiles[i].to(tl.float32) * norm * w * z * sigmoid(z),)
    store_tiles(y, at_y, valid, 1, out, D)


@triton.jit
def backward_kernel(
    o, gate, weight, dy, do, dgate, dweight, rows, B, T, H, gate_stride_s, gate_stride_b, eps, steps,
    D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    w_tiles, dw_tiles = (), ()
    for i in tl.static_range(tile_count(D)):
        w_tiles = w_tiles + (tl.load(weight + 64 * i + tl.arange(0, tile_width(D, i))).to(tl.float32)[None, :],)
        dw_tiles = dw_tiles + (tl.zeros([R, tile_width(D, i)], tl.float32),)
    for step in range(steps):
        row = (step * tl.num_programs(0) + tl.program_id(0)) * R + tl.arange(0, R)
        valid = row < rows
        at_o, at_gate, at_y = _places(row, B, T, H, gate_stride_s, gate_stride_b, D)
        o_tiles, gate_tiles = load_tiles(o, at_o, valid, 1, D), load_tiles(gate, at_gate, valid, 1, D)
        dy_tiles = load_tiles(dy, at_y, valid, 1, D)
        square, along = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
        for i in tl.static_range(tile_count(D)):
            x, z = o_tiles[i].to(tl.float32), gate_tiles[i].to(tl.float32)
            square += tl.sum(x * x, 1)
            along += tl.sum(x * w_tiles[i] * dy_tiles[i].to(tl.float32) * z * sigmoid(z), 1)
        norm = tl.rsqrt(square / D + eps)
        along = (along * norm * norm / D)[:, None]
        norm = norm[:, None]
        do_tiles, dgate_tiles, sums = (), (), ()
        for i in tl.static_range(tile_count(D)):
            x, z, d = o_tiles[i].to(tl.float32), gate_tiles[i].to(tl.float32), dy_tiles[i].to(tl.float32)
            sig = sigmoid(z)
            dn = d * z * sig
            do_tiles = do_tiles + ((dn * w_tiles[i] - x * along) * norm,)
            dgate_tiles = dgate_tiles + (d * x * norm * w_tiles[i] * sig * (1.0 + z * (1.0 - sig)),)
            sums = sums + (dw_tiles[i] + dn * x * norm,)
        dw_tiles = sums
        store_tiles(do, at_o, valid, 1, do_tiles, D)
        store_tiles(dgate, at_y, valid, 1, dgate_tiles, D)
    for i in tl.static_range(tile_count(D)):
        tl.store(dweight + tl.program_id(0) * D + 64 * i + tl.arange(0, tile_width(D, i)), tl.sum(dw_tiles[i], 0))


def _forward_like(o, gate, weight, eps):
    batch, length, heads, dim = o.shape
    return [o.new_empty(length, batch, heads * dim)]


@opaque("gated_rmsnorm_forward", _forward_like)
def _forward(o: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> list[torch.Tensor]:
    batch, length, heads, dim = o.shape
    out = _forward_like(o, gate, weight, eps)
    rows = batch * length * heads
    forward_kernel[(triton.cdiv(rows, FORWARD_ROWS),)](
        o, gate, weight, *out, rows, batch, length, heads, gate.stride(0), gate.stride(1), eps, D=dim,
        R=FORWARD_ROWS, num_warps=4,
    )  # fmt: skip
    return out


def _backward_like(o, gate, weight, dy, eps):
    return [torch.empty_like(o), torch.empty_like(dy), torch.empty_like(weight)]


@opaque("gated_rmsnorm_backward", _backward_like)
def _backward(
    o: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, eps: float
) -> list[torch.Tensor]:
    """Gradients of o, gate and weight."""
    batch, length, heads, dim = o.shape
    rows = batch * length * heads
    programs = min(BACKWARD_PROGRAMS, triton.cdiv(rows, BACKWARD_ROWS))
    do, dgate = torch.empty_like(o), torch.empty_like(dy)
    dweight = torch.empty(programs, dim, device=o.device, dtype=torch.float32)
    backward_kernel[(programs,)](
        o, gate, weight, dy, do, dgate, dweight, rows, batch, length, heads, gate.stride(0), gate.stride(1),
        eps, triton.cdiv(rows, programs * BACKWARD_ROWS), D=dim, R=BACKWARD_ROWS, num_warps=4,
    )  # fmt: skip
    return [do, dgate, dweight.sum(0).to(weight.dtype)]


class GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, gate, weight, eps):
        o, weight = o.contiguous(), weight.contiguous()
        gate = gate if gate.stride(-1) == 1 else gate.contiguous()
        (y,) = _forward(o, gate, weight, eps)
        ctx.save_for_backward(o, gate, weight)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, dy):
        return *_backward(*ctx.saved_tensors, dy.contiguous(), ctx.eps), None
