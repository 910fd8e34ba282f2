"""kda_rule: the recurrence of Kimi Delta Attention, forward and backward.

It is the gated delta rule with a decay for each row of the state instead of one for each head.

Dimensions: b batch, s tokens, Hk key heads, H value heads, K key head dim, V value head dim, n packed sequences. The state is
[K, V].
"""

from typing import Any

import torch
import torch.nn.functional as F

from hybrid_kernels.dispatch import Choice, choose
from hybrid_kernels.documents import check_bounds, check_positions
from hybrid_kernels.kda_rule.backends import fla
from hybrid_kernels.kda_rule.reference import kda_rule_torch, log_decay

__all__ = ["explain", "final_state_and_transition", "kda_rule", "log_decay"]


def kda_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    positions_bs: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S_t = D S_{t-1} + beta_t k_t (v_t - (D S_{t-1})^T k_t)^T with D = diag(exp(g_t)), and o_t = scale * S_t^T q_t. Differentiable.

    Args:
        q, k: [b, s, Hk, K], L2-normalised. Value head h reads key head h // (H // Hk).
        v: [b, s, H, V].
        g: [b, s, H, K] log decay, <= 0. With A_log it is the projection of which the log decay is computed.
        beta: [b, s, H], in (0, 2).
        A_log, dt_bias: [H] and [H * K], fp32. The log decay is -exp(A_log) * softplus(g + dt_bias).
        lower_bound: with A_log, the log decay is lower_bound * sigmoid(exp(A_log) * (g + dt_bias)). In [-5, 0).
        scale: multiplies q; K ** -0.5 by default.
        initial_state: [b, H, K, V] fp32, or [n, H, K, V] with cu_seqlens alone; zero by default.
        cu_seqlens: [n + 1] int bounds of sequences packed in one row (b == 1), each with an initial and a final state. They
            cover the row, and may be empty. With positions_bs: bounds of the documents of all rows, one row after the other.
        positions_bs: position of each token in its document (hybrid_kernels/documents.py). The state is zero before each document.
            The initial state of a row reaches the document that began before the row, if there is one. The final state is that
            of the row's last document. fla takes documents only if cu_seqlens is given too, and no states.

    Returns:
        o [b, s, H, V] in v's dtype, and the final state (fp32, shaped as the initial one) or None.

    Raises:
        ValueError: the shapes do not match, or the requested backend cannot run here.
        RuntimeError: `cu_seqlens` does not cover the row.
    """
    _check(q, k, v, g, beta, initial_state, cu_seqlens, positions_bs)
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, v.shape[1] if positions_bs is None else v.shape[0] * v.shape[1])
    _check_gate(v, k, A_log, dt_bias, lower_bound)
    states = initial_state is not None or output_final_state
    documents = _unsupported_documents(positions_bs is not None, cu_seqlens is not None, states)
    options: dict[str, Any] = dict(A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound, scale=scale)
    options |= dict(initial_state=initial_state, output_final_state=output_final_state)
    if _choose(k, v, documents, backend).backend == "fla":
        return fla.kda_rule_fla(q, k, v, g, beta, cu_seqlens=cu_seqlens, **options)
    if positions_bs is not None:
        cu_seqlens = None  # they say the same
    return kda_rule_torch(q, k, v, g, beta, cu_seqlens=cu_seqlens, positions_bs=positions_bs, **options)


def final_state_and_transition(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    positions_bs: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Return [b, H, K, V + K]: the final state after a zero initial state, and behind it the transition (gated_delta_rule/states.py).

    Differentiable. The transition is the final state of an identity that receives no values. `options`: the gate's arguments and
    `backend` of `kda_rule`.
    """
    batch, _, heads, dim_v = v.shape
    state = torch.float64 if v.dtype == torch.float64 else torch.float32
    start = torch.eye(k.shape[-1], dtype=state, device=v.device).expand(batch, heads, -1, -1)
    _, ends = kda_rule(
        k, k, F.pad(v, (0, k.shape[-1])), g, beta, scale=1.0, initial_state=F.pad(start, (dim_v, 0)),
        output_final_state=True, positions_bs=positions_bs, **options,
    )  # fmt: skip
    assert ends is not None
    return ends


def explain(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    documents: bool = False,
    bounds: bool = False,
    states: bool = False,
    backend: str | None = None,
) -> Choice:
    """Return which backend a call would run, and why.

    Args:
        documents: with positions_bs. bounds: with cu_seqlens.
        states: with an initial or a final state.
    """
    return _choose(k, v, _unsupported_documents(documents, bounds, states), backend)


def _choose(k: torch.Tensor, v: torch.Tensor, documents: str | None, requested: str | None) -> Choice:
    backends = {"fla": lambda: fla.unsupported_reason(v, k.shape[-1], documents), "torch": lambda: None}
    return choose("kda_rule", backends, requested)


def _unsupported_documents(documents: bool, bounds: bool, states: bool) -> str | None:
    """Return why fla cannot take the documents of a call, or None."""
    if documents and not bounds:
        return "it takes documents as cu_seqlens, not as positions"
    if documents and states:
        return "it has a state per document, not per row"
    return None


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    positions_bs: torch.Tensor | None,
) -> None:
    if q.dim() != 4 or v.dim() != 4 or q.shape != k.shape or q.shape[:2] != v.shape[:2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k: expected [b, s, Hk, K] and v [b, s, H, V], got {shapes}")
    if v.shape[2] % k.shape[2]:
        raise ValueError(f"v has {v.shape[2]} heads, not a multiple of k's {k.shape[2]}")
    for name, x, expected in (("g", g, (*v.shape[:3], k.shape[3])), ("beta", beta, tuple(v.shape[:3]))):
        if tuple(x.shape) != expected:
            raise ValueError(f"{name}: expected {expected}, got {tuple(x.shape)}")
    check_positions(positions_bs, *v.shape[:2])
    packed = cu_seqlens if positions_bs is None else None
    if packed is not None and (packed.dim() != 1 or v.shape[0] != 1):
        raise ValueError(f"cu_seqlens: expected [n + 1] with batch size 1, got {tuple(packed.shape)}, {v.shape[0]}")
    if initial_state is not None:
        count = v.shape[0] if packed is None else packed.numel() - 1
        expected = (count, v.shape[2], k.shape[3], v.shape[3])
        if tuple(initial_state.shape) != expected:
            raise ValueError(f"initial_state: expected {expected}, got {tuple(initial_state.shape)}")


def _check_gate(
    v: torch.Tensor,
    k: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
) -> None:
    if (A_log is None) != (dt_bias is None):
        raise ValueError("dt_bias: give both A_log and dt_bias, or neither")
    if lower_bound is not None and not (A_log is not None and -5 <= lower_bound < 0):
        raise ValueError(f"lower_bound: expected a number in [-5, 0) with A_log, got {lower_bound}")
    for name, x, size in (("A_log", A_log, v.shape[2]), ("dt_bias", dt_bias, v.shape[2] * k.shape[3])):
        if x is not None and tuple(x.shape) != (size,):
            raise ValueError(f"{name}: expected [{size}], got {tuple(x.shape)}")
