"""Measure Gated DeltaNet's operations on this process's device, for the planner's hardware files."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from hybrid_kernels.conv_gates import conv_gates
from hybrid_kernels.gated_delta_rule import gated_delta_rule
from hybrid_kernels.gated_rmsnorm import gated_rmsnorm
from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import mixer_spec
from megatron_hybrid.distributed.device import local_device
from megatron_hybrid.distributed.timing import Point, both_passes
from megatron_hybrid.mixers.gated_delta_net.spec import sizes


def points(model: ModelConfig, block: Block, degree: int, tokens: int, form: str) -> Iterator[Point]:
    """Yield the points of a rank's heads; at low degrees the delta rule also for a quarter and four times `tokens`.

    Args:
        degree: tensor parallel size.
        tokens: tokens of a sequence.
        form: "bf16". FP8 does not apply to these operations, so there are no points for it.
    """
    if form != "bf16":
        return
    for sequence in (tokens // 4, tokens, 4 * tokens) if degree <= 2 else (tokens,):
        yield from delta_rule_points(model, block, degree, sequence)
    yield from memory_bound_points(model, block, degree, tokens)
    if degree == 1:
        yield from delta_rule_points(model, block, degree, tokens, batch=4)


def delta_rule_points(model: ModelConfig, block: Block, degree: int, sequence: int, batch: int = 1) -> Iterator[Point]:
    """Yield the points of gated_delta_rule with a rank's heads."""
    gdn, in_proj = sizes(model), mixer_spec(block.mixer).parameter("in_proj.weight", model, block)
    q_width, _, _, _, _, heads = in_proj.rank_sizes(degree)
    key_heads = q_width // gdn.key_head_dim
    device, dtype = local_device(), torch.bfloat16
    q, k = (torch.randn(batch, sequence, key_heads, gdn.key_head_dim, device=device) for _ in range(2))
    q, k = (F.normalize(t, dim=-1).to(dtype).requires_grad_() for t in (q, k))
    v = torch.randn(batch, sequence, heads, gdn.value_head_dim, device=device, dtype=dtype, requires_grad=True)
    g = (-0.1 * torch.rand(batch, sequence, heads, device=device)).requires_grad_()
    beta = (2 * torch.rand(batch, sequence, heads, device=device)).requires_grad_()
    sizes_ = {"op": "recurrence", "sequence": sequence, "batch": batch, "heads": heads}
    sizes_ |= {"key_head_dim": gdn.key_head_dim, "value_head_dim": gdn.value_head_dim}
    yield from both_passes(sizes_, lambda: gated_delta_rule(q, k, v, g, beta)[0], (q, k, v, g, beta))


def memory_bound_points(model: ModelConfig, block: Block, degree: int, tokens: int) -> Iterator[Point]:
    """Yield the points of conv_gates and gated_rmsnorm, the operations between projections and delta rule."""
    gdn = sizes(model)
    in_proj, conv = (
        mixer_spec(block.mixer).parameter(name, model, block) for name in ("in_proj.weight", "conv_weight")
    )
    q_width, _, v_width, _, _, value_heads = in_proj.rank_sizes(degree)
    device, dtype = local_device(), torch.bfloat16
    packed = torch.randn(tokens, 1, in_proj.rank_shape(degree)[0], device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(conv.rank_shape(degree), device=device, dtype=dtype, requires_grad=True)
    a, dt = (torch.rand(value_heads, device=device).requires_grad_() for _ in range(2))
    heads: dict[str, Any] = dict(num_key_heads=q_width // gdn.key_head_dim, num_value_heads=value_heads)
    heads |= dict(key_head_dim=gdn.key_head_dim, value_head_dim=gdn.value_head_dim)
    where = {"tokens": tokens, "degree": degree}

    call = partial(conv_gates, packed, weight, a, dt, return_gate=True, **heads)
    yield from both_passes({"op": "conv_gates", **where}, call, (packed, weight, a, dt))
    o = torch.randn(1, tokens, value_heads, gdn.value_head_dim, device=device, dtype=dtype, requires_grad=True)
    gate = torch.randn(tokens, 1, v_width, device=device, dtype=dtype, requires_grad=True)
    ones = torch.ones(gdn.value_head_dim, device=device, dtype=dtype, requires_grad=True)
    yield from both_passes(
        {"op": "gated_norm", **where}, lambda: gated_rmsnorm(o, gate, ones, gdn.norm_eps), (o, gate, ones)
    )
