"""Runs a run's attention once, with its own shapes, to find the backend and to check that FP8 attention is correct."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_hybrid.base.errors import ConfigError

LARGEST_ERROR = 0.15
"""Largest relative error of FP8 attention on normal data. Correct versions have 0.06, wrong ones 0.37."""

Attention = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class AttentionProbe:
    """Result of a probe."""

    backend: str
    error: float | None
    """||fp8 - bf16|| / ||bf16||; None: nothing runs in FP8."""


def probe_attention(
    fp8: Attention | None,
    plain: Attention,
    s: int,
    b: int,
    heads: int,
    groups: int,
    head_dim: int,
    documents: object | None = None,
) -> AttentionProbe:
    """Run attention on random inputs.

    Args:
        fp8: an FP8 attention module that is not part of the model, because its scales change. None: the run uses `plain`.
        plain: the same module in bf16.
        s, b, heads, groups, head_dim: sizes of a rank's micro-batch.
        documents: that attention must keep apart (mixers/documents.py).

    Raises:
        ConfigError: attention to documents, or FP8 attention, that does not run here, or FP8 attention whose error exceeds
            LARGEST_ERROR.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(s, b, h, head_dim, device="cuda", dtype=torch.bfloat16, generator=generator)
        for h in (heads, groups, groups)
    )
    size = f"{heads} heads of {head_dim} and {s} tokens{'' if documents is None else ' of several documents'}"
    try:
        expected = _run(plain, q, k, v, documents)
    except (ValueError, RuntimeError) as error:
        if documents is None:
            raise
        raise ConfigError.at(
            "data.documents", f"no attention to documents runs at {size} here ({error!s:.120}); set it to keep"
        ) from error
    if fp8 is None:
        return AttentionProbe(_backend(), None)
    try:
        for _ in range(3):  # until the scales settle
            found = _run(fp8, q, k, v, documents)
    except (ValueError, RuntimeError) as error:
        raise ConfigError.at(
            "precision.fp8_attention",
            f"true does not run at {size} here ({error!s:.120}); set it to false"
            f"{'' if documents is None else ', or data.documents to keep'}",
        ) from error
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= LARGEST_ERROR:
        raise ConfigError.at(
            "precision.fp8_attention",
            f"true has a relative error of {difference:.2g} here, above the {LARGEST_ERROR} of a correct version; set it to "
            "false",
        )
    return AttentionProbe(_backend(), difference)


@torch.no_grad()
def _run(
    attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: object | None
) -> torch.Tensor:
    from megatron.core.transformer.enums import AttnMaskType

    mask: dict[str, Any] = dict(attention_mask=None, attn_mask_type=AttnMaskType.causal)
    return attention(q, k, v, **mask, documents=documents).float()


def _backend() -> str:
    from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends

    chosen: dict[str, Any] = _attention_backends
    if chosen["use_flash_attention"]:
        return f"FlashAttention {chosen['flash_attention_backend']}"
    return "cuDNN's fused attention" if chosen["use_fused_attention"] else "unfused attention"
