"""gated_delta_rule: the recurrence at the heart of Gated DeltaNet, forward and backward."""

import torch

from ..dispatch import Choice, choose, has_module, missing_for_triton, triton_interpreted
from ..slices import several
from .reference import gated_delta_rule_torch

__all__ = ["explain", "gated_delta_rule"]


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    group=None,
    save: str = "scores",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T and o_t = scale * S_t^T q_t. Differentiable.

    Args:
        q, k: [b, s, Hk, dk], already L2-normalised. Value head h reads key head h // (Hv // Hk).
        v: [b, s, Hv, dv].
        g: [b, s, Hv] log decay, <= 0. beta: [b, s, Hv], in (0, 2). fp32 on the fast paths.
        scale: multiplies q; dk ** -0.5 by default.
        initial_state: [b, Hv, dk, dv] fp32, or [n, Hv, dk, dv] with n documents; zero by default.
        cu_seqlens: [n + 1] int boundaries of documents packed in one row (b == 1); empty ones are allowed.
        group: the torch.distributed group whose ranks hold one slice each of every sequence, in rank order, of any lengths;
            None: whole sequences. Neither documents nor states of the caller's then. What travels is a state and a transition
            a head, not tokens, and each direction has a second, lighter scan.
        save: what the fast paths keep for the backward beside the inputs: nothing more ("inputs"), the 64 x 64
            matrices of every chunk ("scores", 4 * 64 bytes a token and head), or also its state and new values
            ("states", another 2 * dv * (dk / 64 + 1)). The rest is computed again.

    Returns:
        o [b, s, Hv, dv] in v's dtype, and the final state (fp32, shaped as the initial one) or None.

    Raises:
        ValueError: shapes that do not fit together, or a backend that cannot run here.
    """
    group = several(group)
    _check(q, k, v, g, beta, initial_state, cu_seqlens)
    if group is not None and not (initial_state is None and cu_seqlens is None and not output_final_state):
        raise ValueError("group: slices of sequences take no initial_state, output_final_state or cu_seqlens")
    if save not in ("inputs", "scores", "states"):
        raise ValueError(f'save: expected "inputs", "scores" or "states", got {save!r}')
    options = dict(
        scale=scale, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
    )
    choice = _choose(q, v, backend, group)
    if choice.backend in ("hopper", "triton"):
        from .autograd import gated_delta_rule_triton

        hopper = choice.backend == "hopper"
        return gated_delta_rule_triton(q, k, v, g, beta, save=save, hopper=hopper, group=group, **options)
    if choice.backend == "fla":
        from .peer import gated_delta_rule_fla

        return gated_delta_rule_fla(q, k, v, g, beta, **options)
    return gated_delta_rule_torch(q, k, v, g, beta, group=group, **options)


def explain(q, k, v, g, beta, *, backend: str | None = None, **options) -> Choice:
    """Which backend a call would run, and why; takes the arguments of `gated_delta_rule`."""
    group = several(options.get("group"))
    choice = _choose(q, v, backend, group)
    reason, rejected, documents = choice.reason, dict(choice.rejected), options.get("cu_seqlens")
    if choice.backend in ("hopper", "triton"):
        from .autograd import modules

        hopper = choice.backend == "hopper"
        first, scans, segments = modules(q, v, documents, hopper)
        if hopper:
            from . import cuda_op

            if first is not cuda_op:
                rejected["its kernels in CUDA C++"] = cuda_op.missing(q, v, documents)
            else:
                reason += ", by kernels in CUDA C++"
                reason += "" if scans is cuda_op else f" and Gluon's scans: {cuda_op.slower_scans(q, v)}"
        if segments > 1:
            reason += f", each sequence in {segments} segments for its few heads"
    if group is not None:
        reason += f", each sequence in slices on {group.size()} ranks, which pass states on"
    return Choice(choice.op, choice.backend, reason, rejected)


def _choose(q, v, backend: str | None, group) -> Choice:
    backends = {
        "hopper": lambda: _missing_for_hopper(q, v),
        "triton": lambda: _missing_for_triton(q, v),
        "fla": lambda: _missing_for_fla(v, group),
        "torch": lambda: None,
    }
    return choose("gated_delta_rule", backends, backend)


def _missing_for_triton(q: torch.Tensor, v: torch.Tensor) -> str | None:
    lack = missing_for_triton(q, v)
    if lack is None:
        from .triton_op import missing

        lack = missing(q, v)
    return lack


def _missing_for_hopper(q: torch.Tensor, v: torch.Tensor) -> str | None:
    lack = _missing_for_triton(q, v)
    if lack is None and triton_interpreted():
        lack = "Triton's interpreter does not run Gluon"
    if lack is None:
        from .gluon_op import missing

        lack = missing(q, v)
    return lack


def _missing_for_fla(v: torch.Tensor, group) -> str | None:
    if group is not None:
        return "its own way to slice sequences over ranks is not called from here"
    if not v.is_cuda:
        return "tensors are not on a CUDA device"
    if v.dtype not in (torch.bfloat16, torch.float16):
        return f"fla's chunked kernel takes bf16 or fp16, not {v.dtype}"
    return None if has_module("fla") else "the package flash-linear-attention (fla) is not installed"


def _check(q, k, v, g, beta, initial_state, cu_seqlens) -> None:
    if q.dim() != 4 or v.dim() != 4 or q.shape != k.shape or q.shape[:2] != v.shape[:2]:
        raise ValueError(
            f"q, k: expected [b, s, Hk, dk] and v [b, s, Hv, dv], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if v.shape[2] % k.shape[2]:
        raise ValueError(f"v has {v.shape[2]} heads, not a multiple of k's {k.shape[2]}")
    for name, t in (("g", g), ("beta", beta)):
        if t.shape != v.shape[:3]:
            raise ValueError(f"{name}: expected [b, s, Hv] = {tuple(v.shape[:3])}, got {tuple(t.shape)}")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or v.shape[0] != 1):
        raise ValueError(f"cu_seqlens: expected [n + 1] with batch size 1, got {tuple(cu_seqlens.shape)}, {v.shape[0]}")
    if initial_state is not None:
        count = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        expected = (count, v.shape[2], k.shape[3], v.shape[3])
        if tuple(initial_state.shape) != expected:
            raise ValueError(f"initial_state: expected {expected}, got {tuple(initial_state.shape)}")
