"""Measure attention on this process's device, for the planner's hardware files."""

from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.fp8_recipes import ATTENTION
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import mixer_spec
from megatron_hybrid.distributed.device import has_cuda, local_device
from megatron_hybrid.distributed.timing import Point, both_passes
from megatron_hybrid.precision.recipes import fp8_context


def points(model: ModelConfig, block: Block, degree: int, tokens: int, form: str) -> Iterator[Point]:
    """Yield the points of a rank's heads; at low degrees also for sequences of a quarter and four times `tokens`.

    Args:
        degree: tensor parallel size.
        tokens: tokens of a sequence.
        form: "bf16" or "fp8".
    """
    for sequence in (tokens // 4, tokens, 4 * tokens) if degree <= 2 else (tokens,):
        yield from attention_points(form, model, block, degree, sequence)


def attention_points(
    form: str, model: ModelConfig, block: Block, degree: int, sequence: int, batch: int = 1
) -> Iterator[Point]:
    """Yield the points of causal attention with a rank's heads. FP8 uses delayed scaling."""
    d, qkv = model.attention_head_dim, mixer_spec(block.mixer).parameter("linear_qkv.weight", model, block)
    heads, groups, *_ = (width // d for width in qkv.rank_sizes(degree))
    device, dtype = local_device(), torch.bfloat16
    q = torch.randn(sequence, batch, heads, d, device=device, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(sequence, batch, groups, d, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    if has_cuda() and find_spec("transformer_engine"):
        import transformer_engine.pytorch as te

        attention = te.DotProductAttention(heads, d, num_gqa_groups=groups, attn_mask_type="causal", qkv_format="sbhd")

        context = nullcontext if form == "bf16" else fp8_context(ATTENTION, fp8_dpa=True)

        def forward() -> torch.Tensor:
            with context():
                y: torch.Tensor = attention(q, k, v)
                return y
    else:

        def forward() -> torch.Tensor:
            q_, k_, v_ = (t.permute(1, 2, 0, 3) for t in (q, k, v))
            return F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=heads != groups)

    sizes_ = {"op": "attention", "format": form, "sequence": sequence, "batch": batch, "heads": heads, "head_dim": d}
    yield from both_passes(sizes_, forward, (q, k, v))
