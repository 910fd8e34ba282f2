"""gated_delta_rule: the recurrence of Gated DeltaNet, forward and backward.

Dimensions: b batch, s tokens, Hk key heads, H value heads, K key head dim, V value head dim, n packed sequences. The state is
[K, V].
"""

from dataclasses import replace
from typing import Any

import torch

from hybrid_kernels.dispatch import Choice, choose, has_module, triton_unsupported_reason
from hybrid_kernels.documents import check_bounds, check_positions
from hybrid_kernels.gated_delta_rule.reference import gated_delta_rule_torch

__all__ = ["explain", "gated_delta_rule"]
FAST = ("cuda", "triton")
"""Backends that passes.py runs."""
SAVE = ("inputs", "scores", "states")


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
    positions_bs: torch.Tensor | None = None,
    save: str = "scores",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T and o_t = scale * S_t^T q_t. Differentiable.

    Args:
        q, k: [b, s, Hk, K], L2-normalised. Value head h reads key head h // (H // Hk).
        v: [b, s, H, V].
        g: [b, s, H] log decay, <= 0. beta: [b, s, H], in (0, 2). fp32 for the fast backends.
        scale: multiplies q; K ** -0.5 by default.
        initial_state: [b, H, K, V] fp32, or [n, H, K, V] with cu_seqlens; zero by default.
        cu_seqlens: [n + 1] int bounds of sequences packed in one row (b == 1), each with an initial and a final state. They
            cover the row, and may be empty. Memory and launched programs grow with n. Excludes positions_bs.
        positions_bs: position of each token in its document (hybrid_kernels/documents.py). The state is zero before each document.
            The initial state of a row reaches the document that began before the row, if there is one. The final state is that
            of the row's last document. Cost and memory do not depend on the number of documents.
        save: what the fast backends keep for the backward pass besides the inputs. "inputs": nothing. "scores": the 64 x 64
            matrices of every chunk (4 * 64 bytes per token and head). "states": also its state and new values (another
            2 * V * (K / 64 + 1) bytes). The backward pass recomputes the rest.

    Returns:
        o [b, s, H, V] in v's dtype, and the final state (fp32, shaped as the initial one) or None.

    Raises:
        ValueError: the shapes do not match, or the requested backend cannot run here.
        RuntimeError: `cu_seqlens` does not cover the row.
    """
    _check(q, k, v, g, beta, initial_state, cu_seqlens)
    check_positions(positions_bs, *v.shape[:2])
    if positions_bs is not None and cu_seqlens is not None:
        raise ValueError("positions_bs: it cannot be combined with cu_seqlens")
    if cu_seqlens is not None:
        check_bounds(cu_seqlens, v.shape[1])
    check_save(save)
    choice = choose_backend(q, v, backend, positions_bs is not None)
    if choice.backend in FAST:
        from hybrid_kernels.gated_delta_rule.autograd import gated_delta_rule_fast

        return gated_delta_rule_fast(
            q, k, v, g, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
            cu_seqlens=cu_seqlens, positions_bs=positions_bs, save=save, backend=choice.backend,
        )  # fmt: skip
    options: dict[str, Any] = dict(
        scale=scale, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
    )
    if choice.backend == "fla":
        from hybrid_kernels.gated_delta_rule.backends.fla import gated_delta_rule_fla

        return gated_delta_rule_fla(q, k, v, g, beta, **options)
    return gated_delta_rule_torch(q, k, v, g, beta, **options, positions_bs=positions_bs)


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    documents: bool = False,
    sliced: bool = False,
    backend: str | None = None,
) -> Choice:
    """Return which backend a call would run, and why.

    Args:
        documents: with positions_bs.
        sliced: the tokens are one slice of longer sequences.
    """
    choice = choose_backend(q, v, backend, documents, sliced)
    if choice.backend not in FAST:
        return choice
    from hybrid_kernels.gated_delta_rule.kernels import choose_kernels

    segments = choose_kernels(choice.backend, q, v, cu_seqlens).segments
    if segments == 1:
        return choice
    return replace(choice, reason=f"{choice.reason}, each sequence in {segments} segments for its few heads")


def choose_backend(
    q: torch.Tensor, v: torch.Tensor, requested: str | None, documents: bool = False, sliced: bool = False
) -> Choice:
    """Choose a backend. Arguments: `explain`."""
    backends = {
        "cuda": lambda: _cuda_unsupported_reason(q, v),
        "triton": lambda: _triton_unsupported_reason(q, v),
        "fla": lambda: _fla_unsupported_reason(v, documents, sliced),
        "torch": lambda: None,
    }
    return choose("gated_delta_rule", backends, requested)


def _triton_unsupported_reason(q: torch.Tensor, v: torch.Tensor) -> str | None:
    reason = triton_unsupported_reason(q, v)
    if reason is None:
        from hybrid_kernels.gated_delta_rule.backends.triton.op import unsupported_reason

        reason = unsupported_reason(q, v)
    return reason


def _cuda_unsupported_reason(q: torch.Tensor, v: torch.Tensor) -> str | None:
    reason = _triton_unsupported_reason(q, v)  # `join` is Triton's
    if reason is None:
        from hybrid_kernels.gated_delta_rule.backends.cuda.op import unsupported_reason

        reason = unsupported_reason(q, v)
    return reason


def _fla_unsupported_reason(v: torch.Tensor, documents: bool, sliced: bool) -> str | None:
    if sliced:
        return "it does not return the transition of a slice"
    if documents:
        return "it takes documents as cu_seqlens, not as positions"
    if not v.is_cuda:
        return "tensors are not on a CUDA device"
    if v.dtype not in (torch.bfloat16, torch.float16):
        return f"fla's chunked kernel takes bf16 or fp16, not {v.dtype}"
    if not has_module("fla"):
        return "the package flash-linear-attention (fla) is not installed"
    return _fla_backward_unsupported_reason(v)


def _fla_backward_unsupported_reason(v: torch.Tensor) -> str | None:
    """Return why fla 0.6 refuses its backward pass: on Hopper, Triton 3.4.0 to 3.7.0 miscompiles it (fla issue 640)."""
    if not torch.is_grad_enabled() or torch.cuda.get_device_capability(v.device)[0] != 9 or has_module("tilelang"):
        return None
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:3])
    if (3, 4, 0) <= version < (3, 7, 1):
        return f"its backward pass on Hopper needs TileLang with Triton {triton.__version__}"
    return None


def check_save(save: str) -> None:
    """Raise ValueError if `save` is not one of SAVE."""
    if save not in SAVE:
        raise ValueError(f'save: expected "inputs", "scores" or "states", got {save!r}')


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    if q.dim() != 4 or v.dim() != 4 or q.shape != k.shape or q.shape[:2] != v.shape[:2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k: expected [b, s, Hk, K] and v [b, s, H, V], got {shapes}")
    if v.shape[2] % k.shape[2]:
        raise ValueError(f"v has {v.shape[2]} heads, not a multiple of k's {k.shape[2]}")
    for name, t in (("g", g), ("beta", beta)):
        if t.shape != v.shape[:3]:
            raise ValueError(f"{name}: expected [b, s, H] = {tuple(v.shape[:3])}, got {tuple(t.shape)}")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or v.shape[0] != 1):
        raise ValueError(f"cu_seqlens: expected [n + 1] with batch size 1, got {tuple(cu_seqlens.shape)}, {v.shape[0]}")
    if initial_state is not None:
        count = v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        expected = (count, v.shape[2], k.shape[3], v.shape[3])
        if tuple(initial_state.shape) != expected:
            raise ValueError(f"initial_state: expected {expected}, got {tuple(initial_state.shape)}")
