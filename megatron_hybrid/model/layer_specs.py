"""Which parts each kind of layer is built from.

Both kinds are megatron-core TransformerLayers, mixer and MLP in one. Gated DeltaNet layers are pre-norm: the norms are the
layer's own. Attention layers are post-norm: their output projections end in a norm (RowParallelLinearWithNorm).
"""

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.model.attention import ScaledDotProductAttention, SelfAttention, SelfAttentionSubmodules
from megatron_hybrid.model.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron_hybrid.model.norms import RMSNorm, RowParallelLinearWithNorm


def _mlp(linear_fc2) -> partial:
    return partial(
        MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=linear_fc2)
    )


def gdn_layer_spec(model: ModelConfig) -> ModuleSpec:
    """x + gdn(norm(x)), then x + mlp(norm(x))."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=GatedDeltaNet,
                params=dict(model=model),
                submodules=GatedDeltaNetSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_mlp(RowParallelLinear),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def attention_layer_spec(model: ModelConfig) -> ModuleSpec:
    """x + norm(attention(x)), then x + norm(mlp(x))."""
    row_with_norm = partial(RowParallelLinearWithNorm, linear=RowParallelLinear, norm=RMSNorm)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params=dict(model=model),
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear, core_attention=ScaledDotProductAttention, linear_proj=row_with_norm
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp,
            mlp=_mlp(row_with_norm),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def stack_submodules(model: ModelConfig) -> HybridStackSubmodules:
    """megatron-core's slots: `G` and `*`."""
    return HybridStackSubmodules(gdn_layer=gdn_layer_spec(model), attention_layer=attention_layer_spec(model))
