"""Runs a run's attention once at its own shapes: which backend Transformer Engine takes, and whether it is right."""

from dataclasses import dataclass

import torch

from megatron_hybrid.base.errors import ConfigError

LARGEST_ERROR = 0.15
"""Of FP8 attention, relative, on normal data: right versions err by 0.06, wrong ones by 0.37."""


@dataclass(frozen=True)
class AttentionProbe:
    """What ran."""

    backend: str
    error: float | None
    """||fp8 - bf16|| / ||bf16||; None where nothing runs in FP8."""


def probe_attention(fp8, plain, s: int, b: int, heads: int, groups: int, head_dim: int) -> AttentionProbe:
    """
    Args:
        fp8: an attention module of the run's kind, not part of the model (its scales change); None: plain is the run's.
        plain: the same in bf16.
        s, b, heads, groups, head_dim: of a rank's micro-batch.

    Raises:
        ConfigError: FP8 attention that does not run here, or errs by more than LARGEST_ERROR.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(s, b, h, head_dim, device="cuda", dtype=torch.bfloat16, generator=generator)
        for h in (heads, groups, groups)
    )
    expected = _run(plain, q, k, v)
    if fp8 is None:
        return AttentionProbe(_backend(), None)
    try:
        for _ in range(3):  # the scales settle
            found = _run(fp8, q, k, v)
    except (ValueError, RuntimeError) as error:
        raise ConfigError.at(
            "precision.fp8_attention",
            f"true does not run at {heads} heads of {head_dim} and {s} tokens here ({error!s:.120}); set it to false",
        ) from error
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= LARGEST_ERROR:
        raise ConfigError.at(
            "precision.fp8_attention",
            f"true errs by {difference:.2g} here, where {LARGEST_ERROR} is the most a right one does; set it to false",
        )
    return AttentionProbe(_backend(), difference)


@torch.no_grad()
def _run(attention, q, k, v) -> torch.Tensor:
    from megatron.core.transformer.enums import AttnMaskType

    return attention(q, k, v, attention_mask=None, attn_mask_type=AttnMaskType.causal).float()


def _backend() -> str:
    from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends as chosen

    if chosen["use_flash_attention"]:
        return f"FlashAttention {chosen['flash_attention_backend']}"
    return "cuDNN's fused attention" if chosen["use_fused_attention"] else "unfused attention"
