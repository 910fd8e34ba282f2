"""Kernels of `gated_rmsnorm`, one for each direction. They read o as [b, s, H, d], and gate and y as [s, b, H * d]."""

import triton
import triton.language as tl

from hybrid_kernels.triton_support import load_tiles, sigmoid, store_tiles, tile_count, tile_width


@triton.jit
def _places(row, B, T, H, gate_stride_s, gate_stride_b, D: tl.constexpr):
    """Offsets in o, gate and y of rows, which are numbered over [b, s, H]."""
    token, head = row // H, row % H
    b, s = (token // T).to(tl.int64), (token % T).to(tl.int64)
    return row.to(tl.int64) * D, s * gate_stride_s + b * gate_stride_b + head * D, ((s * B + b) * H + head) * D


@triton.jit
def forward_kernel(
    o, gate, weight, y, rows, B, T, H, gate_stride_s, gate_stride_b, eps, D: tl.constexpr, R: tl.constexpr,
    SIGMOID: tl.constexpr,
):  # fmt: skip
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
        if SIGMOID:
            out = out + (o_tiles[i].to(tl.float32) * norm * w * sigmoid(z),)
        else:
            out = out + (o_tiles[i].to(tl.float32) * norm * w * z * sigmoid(z),)
    store_tiles(y, at_y, valid, 1, out, D)


@triton.jit
def backward_kernel(
    o, gate, weight, dy, do, dgate, dweight, rows, B, T, H, gate_stride_s, gate_stride_b, eps, steps,
    D: tl.constexpr, R: tl.constexpr, SIGMOID: tl.constexpr,
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
            if SIGMOID:
                along += tl.sum(x * w_tiles[i] * dy_tiles[i].to(tl.float32) * sigmoid(z), 1)
            else:
                along += tl.sum(x * w_tiles[i] * dy_tiles[i].to(tl.float32) * z * sigmoid(z), 1)
        norm = tl.rsqrt(square / D + eps)
        along = (along * norm * norm / D)[:, None]
        norm = norm[:, None]
        do_tiles, dgate_tiles, sums = (), (), ()
        for i in tl.static_range(tile_count(D)):
            x, z, d = o_tiles[i].to(tl.float32), gate_tiles[i].to(tl.float32), dy_tiles[i].to(tl.float32)
            sig = sigmoid(z)
            if SIGMOID:
                dn = d * sig
                slope = 1.0 - sig
            else:
                dn = d * z * sig
                slope = 1.0 + z * (1.0 - sig)
            do_tiles = do_tiles + ((dn * w_tiles[i] - x * along) * norm,)
            dgate_tiles = dgate_tiles + (d * x * norm * w_tiles[i] * sig * slope,)
            sums = sums + (dw_tiles[i] + dn * x * norm,)
        dw_tiles = sums
        store_tiles(do, at_o, valid, 1, do_tiles, D)
        store_tiles(dgate, at_y, valid, 1, dgate_tiles, D)
    for i in tl.static_range(tile_count(D)):
        tl.store(dweight + tl.program_id(0) * D + 64 * i + tl.arange(0, tile_width(D, i)), tl.sum(dw_tiles[i], 0))
