"""Linears of a mixer with one input and one output projection, and what is recomputed between them."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig


def build_linears(
    submodules: Any, config: TransformerConfig, tp_group: dist.ProcessGroup, packed_width: int, value_width: int
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return `in_proj` and `out_proj`.

    Args:
        submodules: their classes, a column-parallel and a row-parallel linear.
        packed_width, value_width: outputs of in_proj and inputs of out_proj on one rank.
    """
    ranks = tp_group.size()
    linear = dict(config=config, bias=False, is_expert=False, skip_bias_add=False, tp_group=tp_group)
    in_proj = submodules.in_proj(
        config.hidden_size,
        packed_width * ranks,
        init_method=config.init_method,
        gather_output=False,
        tp_comm_buffer_name="qkv",
        **linear,
    )
    out_proj = submodules.out_proj(
        value_width * ranks,
        config.hidden_size,
        init_method=config.output_layer_init_method,
        input_is_parallel=True,
        tp_comm_buffer_name="proj",
        **linear,
    )
    return in_proj, out_proj


def recomputes_between_linears(config: TransformerConfig) -> bool:
    """Return True if selective recompute covers what is between the linears: core_attn, in megatron-core's words."""
    modules = config.recompute_modules or ["core_attn"]  # this package's trainer names no modules
    return config.recompute_granularity == "selective" and "core_attn" in modules


def recomputes_layers(config: TransformerConfig) -> bool:
    """Return True if all layers are recomputed whole."""
    return config.recompute_granularity == "full" and config.recompute_method == "uniform"
