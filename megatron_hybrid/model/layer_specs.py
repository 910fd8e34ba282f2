"""Layer specs, made of a block's mixer and of the modules of a backend.

Every layer is a megatron-core TransformerLayer: mixer and MLP in one. Norm placement is decided here for all mixers. A pre-norm
is the layer's own, or fused into the linear behind it. A post-norm follows the output projection (RowParallelLinearWithNorm).
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.layer import fused_norms
from megatron_hybrid.arch.mixer import MixerSpec
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import mixer_spec
from megatron_hybrid.mixers.backend import Backend, Linears
from megatron_hybrid.model.norms import RowParallelLinearWithNorm


def layer_specs(model: ModelConfig, backend: Backend) -> list[ModuleSpec]:
    """Return the spec of every layer of the model, first to last."""
    by_symbol = {symbol: _layer_of_block(model, block, backend) for symbol, block in model.blocks_by_symbol.items()}
    return [by_symbol[symbol] for symbol in model.layers]


def _layer_of_block(model: ModelConfig, block: Block, backend: Backend) -> ModuleSpec:
    spec = mixer_spec(block.mixer)
    module_spec = import_module(spec.module).module_spec
    return layer_spec(spec, block, backend, partial(module_spec, model, block, backend))


def layer_spec(
    spec: MixerSpec, block: Block, backend: Backend, mixer: Callable[[Linears], ModuleSpec], mlp: bool = True
) -> ModuleSpec:
    """Return the spec of a layer: x + mixer(x), then, with `mlp`, x + mlp(x), each with the block's norm.

    Args:
        mixer: makes the spec of the mixer from its linears.
    """
    norm, linears = _norm_and_linears(block, backend)
    second: dict[str, Any] = {}
    if mlp:
        submodules = MLPSubmodules(linear_fc1=linears.input, linear_fc2=linears.output)
        make_mlp = partial(backend.mlp.as_mlp_submodule, submodules=submodules)
        second = dict(pre_mlp_layernorm=norm, mlp=make_mlp, mlp_bda=get_bias_dropout_add)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=mixer(linears),
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_keys_of_fused_norms(spec) if norm is not IdentityOp else {},
            **second,
        ),
    )


def _norm_and_linears(block: Block, backend: Backend) -> tuple[Any, Linears]:
    """Return the norm in front of each sublayer, and the sublayers' linears."""
    output: Any = backend.row_linear
    if block.norm != "pre":
        output = partial(RowParallelLinearWithNorm, linear=backend.row_linear, norm=backend.norm)
    if block.norm == "post":
        return IdentityOp, Linears(backend.column_linear, output)
    if backend.norm_column_linear is None:
        return backend.pre_norm, Linears(backend.column_linear, output)
    return IdentityOp, Linears(backend.norm_column_linear, output)


def _keys_of_fused_norms(spec: MixerSpec) -> dict[str, str]:
    """Return prefixes of norms' keys. megatron-core's checkpoints name norms as if they were fused, whether they are or not."""
    return {own.removesuffix("weight"): fused.removesuffix("weight") for fused, own in fused_norms(spec).items()}
