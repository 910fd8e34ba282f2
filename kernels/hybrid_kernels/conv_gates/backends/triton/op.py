"""Launches and autograd of `conv_gates` in Triton. Every sum has a fixed order.

`dims` is [key heads, value heads, key head dim, value head dim, width of the gate, 1 with a decay or else 0] throughout. Without
a decay there are no A_log, dt_bias and g.
"""

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from hybrid_kernels.conv_gates.backends.triton.backward import conv_gates_backward_kernel, conv_gates_sum_kernel
from hybrid_kernels.conv_gates.backends.triton.forward import conv_gates_kernel
from hybrid_kernels.conv_gates.reference import widths
from hybrid_kernels.custom_op import OptionalTensors, custom_op

SEGMENTS, FORWARD_SEGMENT, BACKWARD_SEGMENT = 8, 32, 64
"""Segments per program, and tokens per segment in each direction: a multiple of `rows.AHEAD`. Heads wider than 96 have half as many
segments."""
DOCUMENT_REGISTERS = 168
"""Registers per thread with which three programs of the backward pass share an SM. With documents the compiler would take 240, without
168 at most. Heads wider than 192 need more."""
GATE_TILE = 2048
"""Elements of the gates that a program processes at a time."""
SUM_ROWS, SUM_COLUMNS = 16, 128
BACK = 3
"""Tokens that the convolution looks back on: taps - 1."""
KEY_DIMS = (16, 32, 64, 96, 128, 192, 256)


def unsupported_reason(taps: int, dims: list[int]) -> str | None:
    """Return why these kernels cannot run such shapes, or None."""
    _, value_heads, key_dim, value_dim, gate, _ = dims
    if taps != BACK + 1:
        return f"the convolution has {taps} taps, not {BACK + 1}"
    if key_dim not in KEY_DIMS:
        return f"key_head_dim {key_dim} is none of {', '.join(map(str, KEY_DIMS))}"
    if value_heads * value_dim % 16:
        return f"num_value_heads * value_head_dim = {value_heads * value_dim} is not a multiple of 16"
    if gate % 16:
        return f"gate_width {gate} is not a multiple of 16"
    return None


def _constants(dims: list[int], width: int, documents: bool, tokens: int) -> dict[str, Any]:
    """Return the kernels' constants for segments of `tokens` tokens. A row of q or k fits in one warp."""
    key_heads, heads, dim_k, dim_v, gate, with_decay = dims
    segments = SEGMENTS if dim_k <= 96 else SEGMENTS // 2
    tiles = [tile for tile in (192, 128, 96, 64, 32, 16) if tile * segments <= 96 * SEGMENTS]
    value_tile, gate_tile = (next(tile for tile in tiles if n % tile == 0) for n in (heads * dim_v, gate))
    heads_pow2 = triton.next_power_of_2(heads)
    return dict(
        W=width, HK=key_heads, HV=heads, K=dim_k, V=dim_v, VT=value_tile, GATE=gate, GT=gate_tile,
        DECAY=bool(with_decay), HEADS_POW2=heads_pow2, ROWS=min(segments * tokens, max(16, GATE_TILE // heads_pow2)),
        DOCUMENTS=documents, S=segments, L=tokens,
    )  # fmt: skip


def _units(c: dict[str, Any], with_gate: bool) -> int:
    """Return the number of programs per span of tokens: one per q or k head, tile of v and tile of the gate, one for a and b."""
    units: int = 2 * c["HK"] + c["HV"] * c["V"] // c["VT"] + with_gate * (c["GATE"] // c["GT"]) + 1
    return units


def _forward_like(
    packed: torch.Tensor, weight: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None,
    positions: torch.Tensor | None, dims: list[int], beta_max: float,
) -> OptionalTensors:  # fmt: skip
    length, batch, _ = packed.shape
    heads, values, dim_k, dim_v = dims[:4]
    q, k = (packed.new_empty(batch, length, heads, dim_k) for _ in range(2))
    v = packed.new_empty(batch, length, values, dim_v)
    g, beta = (packed.new_empty(batch, length, values, dtype=torch.float32) for _ in range(2))
    return [q, k, v, None if A_log is None else g, beta]


@custom_op("conv_gates_forward", _forward_like)
def _forward(
    packed: torch.Tensor, weight: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None,
    positions: torch.Tensor | None, dims: list[int], beta_max: float,
) -> OptionalTensors:  # fmt: skip
    """Return q, k, v, g, beta."""
    length, batch, width = packed.shape
    out = _forward_like(packed, weight, A_log, dt_bias, positions, dims, beta_max)
    c = _constants(dims, width, positions is not None, FORWARD_SEGMENT)
    conv_gates_kernel[(_units(c, with_gate=False), triton.cdiv(length, c["S"] * c["L"]), batch)](
        packed, weight, *_given(packed, A_log, dt_bias, positions, *out), length, batch, beta_max, **c,
        num_warps=4,
    )  # fmt: skip
    return out


def _given(packed: torch.Tensor, *tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """Return tensors with `packed` in place of those that are absent. No kernel reads it there."""
    return [packed if x is None else x for x in tensors]


def _backward_like(
    packed: torch.Tensor, weight: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None,
    positions: torch.Tensor | None, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, dg: torch.Tensor | None,
    dbeta: torch.Tensor, dgate: torch.Tensor | None, dims: list[int], beta_max: float,
) -> OptionalTensors:  # fmt: skip
    sums = None if A_log is None else packed.new_empty(2, dims[1], dtype=torch.float32)
    return [torch.empty_like(packed), torch.empty_like(weight), sums]


@custom_op("conv_gates_backward", _backward_like)
def _backward(
    packed: torch.Tensor, weight: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None,
    positions: torch.Tensor | None, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, dg: torch.Tensor | None,
    dbeta: torch.Tensor, dgate: torch.Tensor | None, dims: list[int], beta_max: float,
) -> OptionalTensors:  # fmt: skip
    """Return the gradients of packed and weight, and [2, value heads] those of A_log and dt_bias, if there are any."""
    length, batch, width = packed.shape
    c = _constants(dims, width, positions is not None, BACKWARD_SEGMENT)
    blocks = triton.cdiv(length, c["S"] * c["L"])
    dpacked = torch.empty_like(packed)
    sums = torch.empty(2, c["HV"], device=weight.device, dtype=torch.float32)
    dweight, gates = torch.empty_like(weight), c["DECAY"] * sums.numel()
    partial = torch.empty(blocks * batch, weight.numel() + gates, device=weight.device, dtype=torch.float32)
    gate = None if dgate is None else dgate.contiguous()
    conv_gates_backward_kernel[(_units(c, with_gate=True), blocks, batch)](
        packed, weight, *_given(packed, A_log, dt_bias, positions, dq, dk, dv, dg, dbeta, gate), dpacked, partial,
        length, batch, beta_max, **c, WITH_GATE=gate is not None, num_warps=4,
        maxnreg=DOCUMENT_REGISTERS if c["DOCUMENTS"] and c["K"] <= 192 else None,
    )  # fmt: skip
    conv_gates_sum_kernel[(triton.cdiv(partial.shape[1], SUM_COLUMNS),)](
        partial, dweight, sums, len(partial), N=weight.numel(), GATES=gates, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS
    )
    return [dpacked, dweight, None if A_log is None else sums]


# A halo. The kernels assume that a sequence starts with its first token, which is wrong for its first BACK tokens only. They run
# again on the halo and these tokens, and the wrong results of both runs are dropped. No other token is copied.


def _positions_of_start(positions: torch.Tensor | None) -> torch.Tensor | None:
    """Return the positions of the halo and the first tokens, [b, 2 * BACK].

    The halo's count on those of the first token. Before the document of that token they are negative.
    """
    if positions is None:
        return None
    before = torch.arange(BACK, 0, -1, device=positions.device, dtype=positions.dtype)
    return torch.cat((positions[:, :1] - before, positions[:, :BACK]), 1)


def _correct_start(
    packed: torch.Tensor, weight: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None,
    positions: torch.Tensor | None, halo: torch.Tensor, out: OptionalTensors, dims: list[int], beta_max: float,
) -> torch.Tensor:  # fmt: skip
    """Overwrite the first tokens of q, k and v. Returns the halo and the first tokens, [2 * BACK, b, w]."""
    start, of_start = torch.cat((halo, packed[:BACK])), _positions_of_start(positions)
    for x, correct in zip(out[:3], _forward(start, weight, A_log, dt_bias, of_start, dims, beta_max)):
        assert x is not None and correct is not None
        x[:, :BACK] = correct[:, BACK:]
    return start


def _backward_with_halo(
    packed: torch.Tensor, weight: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None,
    positions: torch.Tensor | None, start: torch.Tensor, grads: OptionalTensors, dgate: torch.Tensor | None,
    dims: list[int], beta_max: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:  # fmt: skip
    """Return the gradients of `_backward`, then that of the halo."""
    of_conv = [x for x in grads[:3] if x is not None]
    first = [x[:, :BACK].clone() for x in of_conv]
    for x in of_conv:
        x[:, :BACK] = 0
    dpacked, dweight, dgates = _backward(packed, weight, A_log, dt_bias, positions, *grads, dgate, dims, beta_max)
    for x, part in zip(of_conv, first):  # autograd may use these gradients again
        x[:, :BACK] = part
    of_start = [None if x is None else x.new_zeros(x.shape[0], 2 * BACK, *x.shape[2:]) for x in grads]
    for zeros, part in zip(of_start[:3], first):
        assert zeros is not None
        zeros[:, BACK:] = part
    dstart, more, _ = _backward(
        start, weight, A_log, dt_bias, _positions_of_start(positions), *of_start, None, dims, beta_max
    )
    assert dpacked is not None and dweight is not None
    assert dstart is not None and more is not None
    dpacked[:BACK] += dstart[BACK:]
    return dpacked, dweight + more, dgates, dstart[:BACK]


class _ConvGates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, packed: torch.Tensor, weight: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None,
        positions: torch.Tensor | None, halo: torch.Tensor | None, dims: list[int], beta_max: float, return_gate: bool,
    ) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
        packed, weight, start = packed.contiguous(), weight.contiguous(), None
        positions = positions if positions is None else positions.contiguous()
        out = _forward(packed, weight, A_log, dt_bias, positions, dims, beta_max)
        if halo is not None:
            start = _correct_start(packed, weight, A_log, dt_bias, positions, halo, out, dims, beta_max)
        ctx.save_for_backward(packed, weight, A_log, dt_bias, positions, start)
        ctx.dims, ctx.beta_max = dims, beta_max
        if return_gate:
            sizes = widths(*dims)
            out = [*out, packed[..., sum(sizes[:3]) : sum(sizes[:4])]]
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        packed, weight, A_log, dt_bias, positions, start = ctx.saved_tensors
        dgate = grads[5] if len(grads) > 5 else None
        given = [None if A_log is None and at == 3 else x.contiguous() for at, x in enumerate(grads[:5])]
        dhalo: torch.Tensor | None = None
        if start is None:
            dpacked, dweight, dgates = _backward(
                packed, weight, A_log, dt_bias, positions, *given, dgate, ctx.dims, ctx.beta_max
            )
        else:
            dpacked, dweight, dgates, dhalo = _backward_with_halo(
                packed, weight, A_log, dt_bias, positions, start, given, dgate, ctx.dims, ctx.beta_max
            )
        dA_log, ddt_bias = (None, None) if dgates is None else (dgates[0].to(A_log.dtype), dgates[1].to(dt_bias.dtype))
        return dpacked, dweight, dA_log, ddt_bias, None, dhalo, None, None, None


def conv_gates_triton(
    packed_sbw: torch.Tensor, weight_ct: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None,
    positions_bs: torch.Tensor | None, halo_sbw: torch.Tensor | None, dims: list[int], beta_max: float, return_gate: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """See `hybrid_kernels.conv_gates.conv_gates`."""
    results: tuple[torch.Tensor | None, ...] = _ConvGates.apply(
        packed_sbw, weight_ct, A_log, dt_bias, positions_bs, halo_sbw, dims, beta_max, return_gate
    )
    return tuple(x for x in results if x is not None)
