"""Specs of both kinds of layers, made of a run's or a library user's parts (model/parts.py).

Both kinds are megatron-core TransformerLayers, mixer and MLP in one. Gated DeltaNet layers are pre-norm: the norms are the
layer's own, or part of the linears behind them. Attention layers are post-norm: their output projections end in a norm
(RowParallelLinearWithNorm).
"""

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_hybrid.arch.model import GatedDeltaNetConfig, ModelConfig
from megatron_hybrid.mixers.attention.module import AttentionSizes, SelfAttention, SelfAttentionSubmodules
from megatron_hybrid.mixers.gated_delta_net.module import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron_hybrid.model.norms import RowParallelLinearWithNorm
from megatron_hybrid.model.parts import Parts

_KEYS_OF_FUSED_NORMS = {
    "input_layernorm.": "self_attention.in_proj.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""megatron-core's checkpoints name norms as Transformer Engine's linears do, so that they load with and without it."""


def _mlp(parts: Parts, linear_fc1, linear_fc2) -> partial:
    return partial(parts.mlp.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2))


def gdn_layer_spec(gdn: GatedDeltaNetConfig, parts: Parts, mlp: bool = True) -> ModuleSpec:
    """Return the spec of x + gdn(norm(x)), then, with `mlp`, x + mlp(norm(x))."""
    norm, linear = (IdentityOp, parts.norm_column_linear)
    if linear is None:
        norm, linear = parts.norm, parts.column_linear
    keys = _KEYS_OF_FUSED_NORMS if parts.norm_column_linear is None else {}
    second = {}
    if mlp:
        second = dict(pre_mlp_layernorm=norm, mlp=_mlp(parts, linear, parts.row_linear), mlp_bda=get_bias_dropout_add)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=GatedDeltaNet,
                params=dict(gdn=gdn),
                submodules=GatedDeltaNetSubmodules(in_proj=linear, out_proj=parts.row_linear),
            ),
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys,
            **second,
        ),
    )


def attention_layer_spec(sizes: AttentionSizes | None, parts: Parts) -> ModuleSpec:
    """Return the spec of x + norm(attention(x)), then x + norm(mlp(x)). No sizes: those of the TransformerConfig."""
    row_with_norm = partial(RowParallelLinearWithNorm, linear=parts.row_linear, norm=parts.norm)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params=dict(sizes=sizes),
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column_linear, core_attention=parts.attention, linear_proj=row_with_norm
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp,
            mlp=_mlp(parts, parts.column_linear, row_with_norm),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def stack_submodules(model: ModelConfig, parts: Parts) -> HybridStackSubmodules:
    """Return the specs for megatron-core's slots `G` and `*`."""
    gdn = gdn_layer_spec(model.gdn, parts) if model.gdn else IdentityOp
    return HybridStackSubmodules(gdn_layer=gdn, attention_layer=attention_layer_spec(AttentionSizes.of(model), parts))
