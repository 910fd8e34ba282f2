"""Between the two passes over a sequence in segments: the state before each segment.

The algebra is that of states.py. The chain of GEMMs is short (one per segment) and in fp32.
"""

import torch
import triton
import triton.language as tl

from hybrid_kernels.custom_op import constant_result
from hybrid_kernels.triton_support import dot_fp32, tile_count, tile_width

COLUMNS = 32
"""Values per program."""


@triton.jit
def _state_tiles(base, cols, width, K: tl.constexpr):
    """Load rows 0 ... K of `base`, `width` wide, at columns `cols`, as a tuple of tiles."""
    tiles = ()
    for i in tl.static_range(tile_count(K)):
        rows = 64 * i + tl.arange(0, tile_width(K, i))
        tiles = tiles + (tl.load(base + rows[:, None] * width + cols[None, :]).to(tl.float32),)
    return tiles


@triton.jit
def _put_state(base, cols, width, tiles, K: tl.constexpr):
    for i in tl.static_range(tile_count(K)):
        rows = 64 * i + tl.arange(0, tile_width(K, i))
        tl.store(base + rows[:, None] * width + cols[None, :], tiles[i])


@triton.jit(do_not_specialize=["segments"])
def join_kernel(
    ends, transitions, given, starts, last, segments,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W_ENDS: tl.constexpr, W_MOVES: tl.constexpr,
    REVERSE: tl.constexpr, WITH_GIVEN: tl.constexpr, WITH_LAST: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Set S = `given` or 0; per segment, in order or REVERSE: starts <- S, S <- M S + ends (M^T in reverse); last <- S."""
    row, i_h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    S = ()
    for i in tl.static_range(tile_count(K)):
        S = S + (tl.zeros([tile_width(K, i), COLS], tl.float32),)
    if WITH_GIVEN:
        S = _state_tiles(given + (row * H + i_h) * K * V, cols, V, K)
    for step in range(segments):
        j = segments - 1 - step if REVERSE else step
        at = ((row * segments + j) * H + i_h) * K
        _put_state(starts + at * V, cols, V, S, K)
        moved = _state_tiles(ends + at * W_ENDS, cols, W_ENDS, K)
        S_next = ()
        for i in tl.static_range(tile_count(K)):
            x = moved[i]
            for m in tl.static_range(tile_count(K)):
                to, of = 64 * i + tl.arange(0, tile_width(K, i)), 64 * m + tl.arange(0, tile_width(K, m))
                M = transitions + at * W_MOVES + V
                M += of[None, :] * W_MOVES + to[:, None] if REVERSE else to[:, None] * W_MOVES + of[None, :]
                x += dot_fp32(tl.load(M), S[m])
            S_next = S_next + (x,)
        S = S_next
    if WITH_LAST:
        _put_state(last + (row * H + i_h) * K * V, cols, V, S, K)


def join(
    ends: torch.Tensor, transitions: torch.Tensor, given: torch.Tensor | None, shape: tuple[int, int, int, int],
    segments: int, *, reverse: bool, last: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Return the state (or gradient) before each segment [b * segments, H, K, V], and the last one [b, H, K, V] or None.

    Args:
        ends: [b * segments, H, K, V or wider]. Its first V columns are the states (gradients) after starting from zero.
        transitions: [b * segments, H, K, wider]. Its columns V ... V + K are the transitions.
        given: [b, H, K, V], the state before the first segment (in reverse: the last); None: zero.
        shape: (b, H, K, V).
    """
    batch, heads, dim_k, dim_v = shape
    starts = ends.new_empty(batch * segments, heads, dim_k, dim_v)
    end = ends.new_empty(shape) if last else None
    join_kernel[(dim_v // COLUMNS, batch * heads)](
        ends, transitions, ends if given is None else given, starts, ends if end is None else end, segments,
        H=heads, K=dim_k, V=dim_v, W_ENDS=ends.shape[-1], W_MOVES=transitions.shape[-1], REVERSE=reverse,
        WITH_GIVEN=given is not None, WITH_LAST=last, COLS=COLUMNS, num_warps=4, num_stages=2,
    )  # fmt: skip
    return starts, end


def segments_that_pay(tiles: int, chunks: int, processors: int) -> int:
    """Return into how many segments to cut every sequence of `chunks` chunks. Uncut, the scans run `tiles` programs.

    A scan is sequential. It takes the same time with few programs as with one per SM, and twice as long with one more than that, so
    the cost is rounds of programs times chunks of each. Cutting costs a second, lighter pass and `join`. A segment has at least
    16 chunks.
    """

    def steps(segments: int) -> float:
        rounds, per = -(-tiles * segments // max(processors, 1)), -(-chunks // segments)
        return rounds * per if segments == 1 else 1.5 * rounds * per + 4 * segments

    best = min(range(1, max(1, min(8, chunks // 16)) + 1), key=steps)
    return -(-chunks // -(-chunks // best))  # so that no segment is empty


@constant_result
def processors(device: torch.device) -> int:
    """Return the number of SMs; 0 on a CPU, where nothing runs in parallel."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
