"""The gated delta rule in plain torch: the recurrent oracle, and the chunked form that CPU training runs on.

Per value head, with S [dk, dv] the state:
    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T,      o_t = scale * S_t^T q_t

Sources: Yang et al., Gated Delta Networks (arXiv 2412.06464); the chunked (WY) form is theirs, section 3.3.
Both compute in fp32, or in fp64 when v is fp64, and run on any device under autograd.
"""

import torch
import torch.nn.functional as F

from ..slices import StateBefore

CHUNK = 64


def gated_delta_rule_recurrent(
    q, k, v, g, beta, *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
):
    """Token by token, as the equations read. Arguments and results: `gated_delta_rule`."""
    return _by_document(_recurrent, q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens)


def gated_delta_rule_torch(
    q, k, v, g, beta, *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, group=None
):
    """Chunks of 64 tokens: matrix products inside a chunk, a scan of states across chunks."""
    if group is not None:
        initial_state = _state_before(k, v, g, beta, group)
    return _by_document(_chunked, q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens)


def _state_before(k, v, g, beta, group):
    """The state [b, heads, dk, dv] that this rank's slice of every sequence starts from, by a scan of its own."""
    batch, _, heads, dv = v.shape
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    # beside the state, the identity with values of zero: it ends as what the slice does to any state
    start = torch.eye(k.shape[-1], dtype=compute, device=v.device).expand(batch, heads, -1, -1)
    _, ends = _by_document(_chunked, k, k, F.pad(v, (0, k.shape[-1])), g, beta, 1.0, F.pad(start, (dv, 0)), True, None)
    return StateBefore.apply(ends, dv, group)


def _by_document(rule, q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens):
    """Run `rule` on [batch, heads, tokens, dim] tensors of the compute dtype, one document at a time."""
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    heads, groups = v.shape[2], v.shape[2] // k.shape[2]
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    qh, kh, vh = (x.to(compute).transpose(1, 2) for x in (q, k, v))
    if groups > 1:  # expand rather than repeat_interleave: its gradient is a plain, deterministic sum
        qh, kh = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (qh, kh))
    gh, bh = (x.to(compute).transpose(1, 2) for x in (g, beta))
    bounds = [0, v.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    documents = list(zip(bounds[:-1], bounds[1:]))
    states = initial_state
    if states is None:
        count = v.shape[0] if cu_seqlens is None else len(documents)
        states = torch.zeros(count, heads, k.shape[-1], v.shape[-1], dtype=compute, device=v.device)
    outs, finals = [], []
    for i, (start, end) in enumerate(documents):
        state = (states if cu_seqlens is None else states[i : i + 1]).to(compute)
        if end > start:
            o, state = rule(*(x[:, :, start:end] for x in (qh * scale, kh, vh, gh, bh)), state)
            outs.append(o)
        finals.append(state)
    o = torch.cat(outs, dim=2).transpose(1, 2).to(v.dtype).contiguous()
    return o, (torch.cat(finals) if output_final_state else None)


def _recurrent(q, k, v, g, beta, state):
    outs = []
    for t in range(q.shape[2]):
        state = state * g[:, :, t, None, None].exp()
        correction = (v[:, :, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, :, t])) * beta[:, :, t, None]
        state = state + k[:, :, t, :, None] * correction[:, :, None, :]
        outs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return torch.stack(outs, dim=2), state


def _chunked(q, k, v, g, beta, state):
    length, dv = q.shape[2], v.shape[-1]
    size = min(CHUNK, length)
    pad = -length % size
    if pad:  # beta = 0 and g = 0: a padding token neither writes nor decays
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        g, beta = (F.pad(x, (0, pad)) for x in (g, beta))
    q, k, v, g, beta = (x.unflatten(2, (-1, size)) for x in (q, k, v, g, beta))  # [b, h, n, size, ...]

    decay = g.cumsum(-1)
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    between = decay.unsqueeze(-1) - decay.unsqueeze(-2)
    between = between.masked_fill(future, float("-inf")).exp()  # masked first: above the diagonal exp overflows
    # (I + tril(beta k k^T decay, -1)) [u | w] = beta [v | k exp(decay)]; the solve takes the diagonal as ones
    system = (k * beta.unsqueeze(-1)) @ k.transpose(-1, -2) * between
    targets = torch.cat([v, k * decay.exp().unsqueeze(-1)], dim=-1) * beta.unsqueeze(-1)
    u, w = torch.linalg.solve_triangular(system, targets, upper=False, unitriangular=True).split(
        [dv, k.shape[-1]], dim=-1
    )
    scores = (q @ k.transpose(-1, -2)) * between
    q_in = q * decay.exp().unsqueeze(-1)
    k_out = (k * (decay[..., -1:] - decay).exp().unsqueeze(-1)).transpose(-1, -2)
    total = decay[..., -1].exp()[..., None, None]

    carried, corrections = [], []
    for i in range(q.shape[2]):
        new = u[:, :, i] - w[:, :, i] @ state
        carried.append(q_in[:, :, i] @ state)
        corrections.append(new)
        state = total[:, :, i] * state + k_out[:, :, i] @ new
    o = torch.stack(carried, dim=2) + scores @ torch.stack(corrections, dim=2)
    return o.flatten(2, 3)[:, :, :length], state
