"""Layer and stack specs from nothing but a GatedDeltaNetConfig."""

from importlib.util import find_spec
from typing import Literal, get_args

from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_hybrid.arch.model import GatedDeltaNetConfig
from megatron_hybrid.base.errors import ConfigError, UserError
from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.mixers.attention.module import ScaledDotProductAttention
from megatron_hybrid.model.hybrid_stack import HybridStackWithNorm
from megatron_hybrid.model.layer_specs import attention_layer_spec, gdn_layer_spec
from megatron_hybrid.model.norms import norm_of_config
from megatron_hybrid.model.parts import Parts

Backend = Literal["auto", "local", "transformer_engine"]


def gated_delta_net_layer_spec(gdn: GatedDeltaNetConfig, backend: Backend = "auto", *, mlp: bool = True) -> ModuleSpec:
    """Return the spec of a pre-norm layer: x + gdn(norm(x)), then x + mlp(norm(x)).

    The layer is a megatron-core TransformerLayer. It takes and returns hidden states [s, b, h]: s / tensor parallel size tokens
    under sequence parallelism. Give it to GPTModel as `transformer_layer_spec`, alone or in TransformerBlockSubmodules beside
    others, or to HybridStackSubmodules as `gdn_layer`.

    Args:
        gdn: sizes of the mixer. Head counts need not be multiples of the tensor parallel size: dummy heads, always zero, fill up.
        backend: whose linears and norms. "auto": Transformer Engine's where CUDA and it are there, else megatron-core's own.
        mlp: False leaves the MLP out, for layers of HybridModel whose pattern has MLPs of their own (`G-`).

    Raises:
        ConfigError: an unknown backend, or one that cannot run here. Building the model raises UserError, which names the field
            of the TransformerConfig that the layer does not support.

    Example:
        >>> gdn = GatedDeltaNetConfig(num_key_heads=30, num_value_heads=30, key_head_dim=96, value_head_dim=192)
        >>> model = GPTModel(config, gated_delta_net_layer_spec(gdn), vocab_size=100352, max_sequence_length=8192)
    """
    return gdn_layer_spec(_checked(gdn), _parts(backend), mlp)


def olmo_hybrid_stack_spec(gdn: GatedDeltaNetConfig, backend: Backend = "auto") -> ModuleSpec:
    """Return the spec of OLMo Hybrid's stack, for HybridModel's `hybrid_stack_spec`.

    In `hybrid_layer_pattern`, `G` is a pre-norm Gated DeltaNet layer and `*` a post-norm attention layer with QK norm over the
    whole projections. Both have an MLP of their own: the 7B model is `GGG*` eight times. Attention's sizes are the
    TransformerConfig's.

    Args:
        gdn, backend: as in `gated_delta_net_layer_spec`.

    Raises:
        ConfigError: as `gated_delta_net_layer_spec` does.
    """
    parts = _parts(backend)
    submodules = HybridStackSubmodules(
        mamba_layer=_NotInStack,
        gdn_layer=gdn_layer_spec(_checked(gdn), parts),
        attention_layer=attention_layer_spec(None, parts),
        dsa_layer=_NotInStack,
        mla_layer=_NotInStack,
        mlp_layer=_NotInStack,
        moe_layer=_NotInStack,
    )
    return ModuleSpec(module=HybridStackWithNorm, params=dict(norm=parts.norm), submodules=submodules)


class _NotInStack:
    """A slot of HybridStack that olmo_hybrid_stack_spec leaves empty. megatron-core's default for it would do nothing, silently."""

    def __init__(self, *_, **__):
        raise UserError(
            "hybrid_layer_pattern: olmo_hybrid_stack_spec has only layers G and *, each with its MLP; write only these two"
        )


def _checked(gdn: GatedDeltaNetConfig) -> GatedDeltaNetConfig:
    if not isinstance(gdn, GatedDeltaNetConfig):
        raise ConfigError.at("gdn", f"is a {type(gdn).__name__}; give a megatron_hybrid.spec.GatedDeltaNetConfig")
    return gdn


def _parts(backend: Backend) -> Parts:
    if backend not in get_args(Backend):
        raise ConfigError.at("backend", f"{backend!r} is none of {', '.join(get_args(Backend))}")
    installed = find_spec("transformer_engine") is not None
    obstacle = next(
        (
            why
            for there, why in ((has_cuda(), "no CUDA device is visible"), (installed, "it is not installed"))
            if not there
        ),
        None,
    )
    if backend == "local" or (backend == "auto" and obstacle):
        return _local_parts()
    if obstacle:
        raise ConfigError.at("backend", f"transformer_engine cannot run: {obstacle}; set it to local or auto")
    return _transformer_engine_parts()


def _local_parts() -> Parts:
    attention = ScaledDotProductAttention
    return Parts(
        "megatron-core and torch",
        ColumnParallelLinear,
        None,
        RowParallelLinear,
        norm_of_config,
        attention,
        attention,
        MLP,
    )


def _transformer_engine_parts() -> Parts:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    return Parts(
        "Transformer Engine",
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
        TENorm,
        TEDotProductAttention,
        TEDotProductAttention,
        MLP,
    )
