"""Layer and stack specs from a GatedDeltaNetConfig and nothing else."""

from functools import partial
from importlib.util import find_spec
from typing import Literal, get_args

from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_hybrid.base.errors import ConfigError, UserError
from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.mixers.attention.local import ScaledDotProductAttention
from megatron_hybrid.mixers.attention.module import mixer_module_spec as attention_spec
from megatron_hybrid.mixers.attention.spec import Attention
from megatron_hybrid.mixers.backend import Backend
from megatron_hybrid.mixers.gated_delta_net.config import GatedDeltaNetConfig
from megatron_hybrid.mixers.gated_delta_net.module import mixer_module_spec as gated_delta_net_spec
from megatron_hybrid.mixers.gated_delta_net.spec import GatedDeltaNet
from megatron_hybrid.model.hybrid_stack import HybridStackWithNorm
from megatron_hybrid.model.layer_specs import layer_spec
from megatron_hybrid.model.norms import norm_of_config

BackendName = Literal["auto", "local", "transformer_engine"]


def gated_delta_net_layer_spec(
    gdn: GatedDeltaNetConfig, backend: BackendName = "auto", *, mlp: bool = True
) -> ModuleSpec:
    """Return the spec of a pre-norm layer: x + gdn(norm(x)), then x + mlp(norm(x)).

    The layer is a megatron-core TransformerLayer. It takes and returns hidden states [s, b, h]: s / tensor parallel size tokens
    under sequence parallelism. Give it to GPTModel as `transformer_layer_spec`, alone or with others in TransformerBlockSubmodules,
    or to HybridStackSubmodules as `gdn_layer`.

    Args:
        gdn: sizes of the mixer. Head counts need not be multiples of the tensor parallel size: they are padded with zero heads.
        backend: modules of linears and norms. "auto": Transformer Engine's if it and CUDA are available, else megatron-core's.
        mlp: False omits the MLP, for HybridModel patterns with separate MLP layers (`G-`).

    Raises:
        ConfigError: an unknown backend, or one that cannot run here. Building the model raises UserError, which names the field
            of the TransformerConfig that the layer does not support.

    Example:
        >>> gdn = GatedDeltaNetConfig(num_key_heads=30, num_value_heads=30, key_head_dim=96, value_head_dim=192)
        >>> model = GPTModel(config, gated_delta_net_layer_spec(gdn), vocab_size=100352, max_sequence_length=8192)
    """
    return _gated_delta_net_layer(_checked(gdn), _backend(backend), mlp)


def olmo_hybrid_stack_spec(gdn: GatedDeltaNetConfig, backend: BackendName = "auto") -> ModuleSpec:
    """Return the spec of OLMo Hybrid's stack, for HybridModel's `hybrid_stack_spec`.

    In `hybrid_layer_pattern`, `G` is a pre-norm Gated DeltaNet layer and `*` a post-norm attention layer with QK norm over the
    whole projections. Both have an MLP of their own: the 7B model is `GGG*` eight times. Attention's sizes are the
    TransformerConfig's.

    Args:
        gdn, backend: as in `gated_delta_net_layer_spec`.

    Raises:
        ConfigError: as `gated_delta_net_layer_spec` does.
    """
    modules = _backend(backend)
    attention = layer_spec(Attention(), Attention.blocks["A"], modules, partial(attention_spec, None, modules))
    submodules = HybridStackSubmodules(
        mamba_layer=_NotInStack,
        gdn_layer=_gated_delta_net_layer(_checked(gdn), modules),
        attention_layer=attention,
        dsa_layer=_NotInStack,
        mla_layer=_NotInStack,
        mlp_layer=_NotInStack,
        moe_layer=_NotInStack,
    )
    return ModuleSpec(module=HybridStackWithNorm, params=dict(norm=modules.norm), submodules=submodules)


def _gated_delta_net_layer(gdn: GatedDeltaNetConfig, backend: Backend, mlp: bool = True) -> ModuleSpec:
    return layer_spec(GatedDeltaNet(), GatedDeltaNet.blocks["G"], backend, partial(gated_delta_net_spec, gdn), mlp)


class _NotInStack:
    """A slot of HybridStack that olmo_hybrid_stack_spec leaves empty. megatron-core's default for it silently does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        raise UserError(
            "hybrid_layer_pattern: olmo_hybrid_stack_spec has only layers G and *, each with its MLP; write only these two"
        )


def _checked(gdn: GatedDeltaNetConfig) -> GatedDeltaNetConfig:
    if not isinstance(gdn, GatedDeltaNetConfig):
        raise ConfigError.at("gdn", f"is a {type(gdn).__name__}; give a megatron_hybrid.spec.GatedDeltaNetConfig")
    return gdn


def _backend(backend: BackendName) -> Backend:
    if backend not in get_args(BackendName):
        raise ConfigError.at("backend", f"{backend!r} is none of {', '.join(get_args(BackendName))}")
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
        return _local()
    if obstacle:
        raise ConfigError.at("backend", f"transformer_engine cannot run: {obstacle}; set it to local or auto")
    return _transformer_engine()


def _local() -> Backend:
    return Backend(
        name="megatron-core and torch",
        column_linear=ColumnParallelLinear,
        norm_column_linear=None,
        row_linear=RowParallelLinear,
        norm=norm_of_config,
        pre_norm=norm_of_config,
        attention=ScaledDotProductAttention,
        plain_attention=ScaledDotProductAttention,
        mlp=MLP,
    )


def _transformer_engine() -> Backend:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    from megatron_hybrid.mixers.attention.transformer_engine import TransformerEngineAttention

    return Backend(
        name="Transformer Engine",
        column_linear=TEColumnParallelLinear,
        norm_column_linear=TELayerNormColumnParallelLinear,
        row_linear=TERowParallelLinear,
        norm=TENorm,
        pre_norm=TENorm,
        attention=TransformerEngineAttention,
        plain_attention=TransformerEngineAttention,
        mlp=MLP,
    )
