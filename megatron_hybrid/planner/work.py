"""What an operation has to do: FLOPs and bytes at least moved, forward and backward. The formulas that rates are fitted with
and that times are predicted with."""

from typing import Literal

from megatron_hybrid.planner.plan import Widths

Way = Literal["forward", "backward"]


def linear_flops(m: float, n: float, k: float, way: str) -> float:
    """[m, k] by [n, k]: one product forward, two backward."""
    return (1 if way == "forward" else 2) * 2.0 * m * n * k


def linear_bytes(m: float, n: float, k: float, way: str) -> float:
    """Bytes that a linear's pass moves at least, in bf16 and with an fp32 buffer for the weight's gradient."""
    inputs = 2 * (m * k + n * k + m * n)
    return inputs if way == "forward" else 2 * inputs + 8 * n * k


def attention_flops(sequence: float, batch: float, width: float, way: str, window: float | None = None) -> float:
    """Of causal attention: two products forward, five backward, over the pairs seen."""
    seen = min(window or sequence, sequence)
    pairs = seen * (2 * sequence - seen) / 2
    return (2 if way == "forward" else 5) * 2.0 * pairs * width * batch


def hops(op: str, ranks: int) -> float:
    """Steps of a ring."""
    return {"all_reduce": 2.0 * (ranks - 1), "p2p": 1.0}.get(op, float(ranks - 1))


def wire_bytes(op: str, ranks: int, size: float) -> float:
    """Bytes that each rank sends, of a whole tensor of `size`."""
    share = (ranks - 1) / ranks
    return {"all_reduce": 2 * share * size, "p2p": size}.get(op, share * size)


def glue_bytes(op: str, w: Widths, way: str, element: int = 2) -> float:
    """Bytes a token that a memory-bound operation reads and writes. Those on the residual stream are of a whole token."""
    forward, e = way == "forward", element
    match op:
        case "conv_gates":
            results = e * (2 * w.gdn_key + w.gdn_value) + 8 * w.gdn_heads
            read = e * w.gdn_packed
            return read + results if forward else 2 * read + results + 2 * e * w.gdn_value
        case "gated_norm":
            return (3 if forward else 5) * e * w.gdn_value
        case "qk_norm_rope":
            return (2 if forward else 3) * e * (w.q + 2 * w.kv)
        case "swiglu":
            return (3 if forward else 5) * e * w.ffn
        case "norm":
            return (2 if forward else 3) * e * w.hidden
        case "residual":
            return 3 * e * w.hidden
    raise KeyError(op)
