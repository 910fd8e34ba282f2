"""Oracles of `gated_delta_rule` in plain torch: the recurrence, and the chunked form that CPU training runs on.

Per value head, with the state S [K, V]:
    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T,      o_t = scale * S_t^T q_t

Source: Yang et al., Gated Delta Networks (arXiv 2412.06464); the chunked (WY) form is that of their section 3.3.
`kda_rule` runs on the same code, with g [b, s, H, K]: a decay per row of the state (arXiv 2510.26692).
Both compute in fp32, or in fp64 for fp64 values, on any device under autograd.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

CHUNK = 64
CHANNEL_CHUNK = 16
"""Tokens per chunk where each channel has a decay of its own: the decays between them are [16, 16, K] per chunk."""
Results = tuple[torch.Tensor, torch.Tensor | None]


def gated_delta_rule_recurrent(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, *,
    scale: float | None = None, initial_state: torch.Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None, positions_bs: torch.Tensor | None = None,
) -> Results:  # fmt: skip
    """Iterate over the tokens. Arguments and results: `gated_delta_rule`."""
    return _run(
        _recurrent, (q, k, v, g, beta), scale, initial_state, output_final_state, cu_seqlens, positions_bs
    )  # fmt: skip


def gated_delta_rule_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, *,
    scale: float | None = None, initial_state: torch.Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None, positions_bs: torch.Tensor | None = None,
) -> Results:  # fmt: skip
    """Iterate over chunks of 64 tokens, with GEMMs inside a chunk. Arguments and results: `gated_delta_rule`."""
    return _run(
        _chunked, (q, k, v, g, beta), scale, initial_state, output_final_state, cu_seqlens, positions_bs
    )  # fmt: skip


def final_state_and_transition(
    k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, positions_bs: torch.Tensor | None = None
) -> torch.Tensor:
    """Return [b, H, K, V + K]: the final state after a zero initial state, and behind it the transition (see states.py).

    Differentiable. The transition is the final state of an identity that receives no values.
    """
    batch, _, heads, dv = v.shape
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    start = torch.eye(k.shape[-1], dtype=compute, device=v.device).expand(batch, heads, -1, -1)
    inputs = (k, k, F.pad(v, (0, k.shape[-1])), g, beta)
    _, ends = _run(_chunked, inputs, 1.0, F.pad(start, (dv, 0)), True, None, positions_bs)
    assert ends is not None
    return ends


def _run(
    rule: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    inputs: tuple[torch.Tensor, ...],
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
    positions_bs: torch.Tensor | None,
) -> Results:
    """Run `rule` on [batch, heads, tokens, dim] tensors of the compute dtype, one packed sequence at a time."""
    q, k, v, g, beta = inputs
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    heads, groups = v.shape[2], v.shape[2] // k.shape[2]
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    qh, kh, vh = (x.to(compute).transpose(1, 2) for x in (q, k, v))
    if groups > 1:  # expand, whose gradient is a plain, deterministic sum
        qh, kh = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (qh, kh))
    gh, bh = (x.to(compute).transpose(1, 2) for x in (g, beta))
    bounds = [0, v.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    sequences = list(zip(bounds[:-1], bounds[1:]))
    states = initial_state
    if states is None:
        count = v.shape[0] if cu_seqlens is None else len(sequences)
        states = torch.zeros(count, heads, k.shape[-1], v.shape[-1], dtype=compute, device=v.device)
    outs, finals = [], []
    for i, (start, end) in enumerate(sequences):
        state = (states if cu_seqlens is None else states[i : i + 1]).to(compute)
        if end > start:
            o, state = rule(*(x[:, :, start:end] for x in (qh * scale, kh, vh, gh, bh)), state, positions_bs)
            outs.append(o)
        finals.append(state)
    o = torch.cat(outs, dim=2).transpose(1, 2).to(v.dtype).contiguous()
    return o, (torch.cat(finals) if output_final_state else None)


def _recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    positions_bs: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Iterate over the tokens of [batch, heads, tokens, dim] tensors; g may have a dim of its own, K."""
    outs = []
    for t in range(q.shape[2]):
        state = state * g[:, :, t].exp().reshape(*state.shape[:2], -1, 1)
        if positions_bs is not None:
            state = state.masked_fill((positions_bs[:, t] == 0)[:, None, None, None], 0)
        correction = (v[:, :, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, :, t])) * beta[:, :, t, None]
        state = state + k[:, :, t, :, None] * correction[:, :, None, :]
        outs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return torch.stack(outs, dim=2), state


def _exp(x: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """Return e^x, and zero where `zero`. Masked first, because e^x may overflow there."""
    return (x if zero is None else x.masked_fill(zero, float("-inf"))).exp()


def _decay_in_chunks(
    g: torch.Tensor, positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the running sum of g [b, h, n, size, c] inside chunks and documents, and three masks.

    The masks are true [i, j, 1] where token i does not see token j, [i, 1] where i does not see the state before the chunk, and
    [j, 1] where the last token does not see j. Sums are over tokens of one document, so that not even the rounding depends on
    others.

    Args:
        positions: [b, 1, n, size]. None: each row is one document, and the last two masks are None.
    """
    size = g.shape[-2]
    future = torch.ones(size, size, dtype=torch.bool, device=g.device).triu(1)
    if positions is None:
        return g.cumsum(-2), future.unsqueeze(-1), None, None
    token = torch.arange(size, device=g.device)
    unseen = (future | (token[:, None] - token > positions[..., None])).unsqueeze(-1)
    g = g.masked_fill((positions == 0).unsqueeze(-1), 0)  # there is no state to decay
    decay = g.unsqueeze(-3).masked_fill(unseen, 0).sum(-2)
    return decay, unseen, (positions <= token).unsqueeze(-1), unseen[..., -1, :, :]


def _products(a: torch.Tensor, b: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """Return [..., i, j]: the products of rows i of a and j of b [..., size, K] with decay [..., i, j, 1 or K] between them."""
    if decay.shape[-1] == 1:
        return (a @ b.transpose(-1, -2)) * decay.squeeze(-1)
    return torch.einsum("...ik,...jk,...ijk->...ij", a, b, decay)


def _chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    positions_bs: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    length, dv = q.shape[2], v.shape[-1]
    per_channel = g.dim() == 4
    g = g if per_channel else g.unsqueeze(-1)
    size = min(CHANNEL_CHUNK if per_channel else CHUNK, length)
    pad = -length % size
    if pad:  # beta = 0 and g = 0: a padding token does not change the state
        q, k, v, g = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v, g))
        beta = F.pad(beta, (0, pad))
    q, k, v, g, beta = (x.unflatten(2, (-1, size)) for x in (q, k, v, g, beta))  # [b, h, n, size, ...]
    position = None
    if positions_bs is not None:
        padding = positions_bs[:, -1:] + torch.arange(1, pad + 1, device=positions_bs.device)
        position = torch.cat((positions_bs, padding), 1).unflatten(1, (-1, size)).unsqueeze(1)

    decay, unseen, began_inside, before_last = _decay_in_chunks(g, position)
    between = _exp(decay.unsqueeze(-2) - decay.unsqueeze(-3), unseen)
    # (I + tril(beta k k^T decay, -1)) [u | w] = beta [v | k exp(decay)]; the solve takes the diagonal as ones
    system = _products(k * beta.unsqueeze(-1), k, between)
    targets = torch.cat([v, k * _exp(decay, began_inside)], dim=-1) * beta.unsqueeze(-1)
    u, w = torch.linalg.solve_triangular(system, targets, upper=False, unitriangular=True).split(
        [dv, k.shape[-1]], dim=-1
    )
    scores = _products(q, k, between)
    q_in = q * _exp(decay, began_inside)
    k_out = (k * _exp(decay[..., -1:, :] - decay, before_last)).transpose(-1, -2)
    total = _exp(decay[..., -1, :], None if began_inside is None else began_inside[..., -1, :]).unsqueeze(-1)

    carried, corrections = [], []
    for i in range(q.shape[2]):
        new = u[:, :, i] - w[:, :, i] @ state
        carried.append(q_in[:, :, i] @ state)
        corrections.append(new)
        state = total[:, :, i] * state + k_out[:, :, i] @ new
    o = torch.stack(carried, dim=2) + scores @ torch.stack(corrections, dim=2)
    return o.flatten(2, 3)[:, :, :length], state
