"""The backend for GPUs: Transformer Engine's linears and attention as megatron-core wraps them, its SwiGLU, and our norms.

The GEMM of a weight's gradient adds it directly to DDP's fp32 buffer (`main_grad`). megatron-core's own switch for that would
require Apex's kernel in its output layer as well, so only these modules get it.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
import transformer_engine.pytorch as te
import transformer_engine_torch as kernels  # te loads it
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable

from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.mixers.attention.transformer_engine import TransformerEngineAttention
from megatron_hybrid.mixers.backend import Backend
from megatron_hybrid.model.backends.current_scaling import (
    HandedGradient,
    current_scaling,
    gradient_quantizer,
    input_quantizer,
)
from megatron_hybrid.model.mlp import SwiGLU
from megatron_hybrid.model.norms import PreNorm, RMSNorm
from megatron_hybrid.precision.recipes import attention_recipe


def _into_main_grad(config: TransformerConfig) -> TransformerConfig:
    config = copy.copy(config)
    config.gradient_accumulation_fusion = True
    return config


class ColumnLinear(TEColumnParallelLinear):
    """A column-parallel linear."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=_into_main_grad(config), **kwargs)
        # megatron-core sets it only for the linear with a norm
        self.ub_overlap_rs_dgrad = config.tp_comm_overlap and config.tp_comm_overlap_rs_dgrad


class NormColumnLinear(TELayerNormColumnParallelLinear):
    """Transformer Engine's RMSNorm, then a column-parallel linear. With delayed scaling the norm writes FP8."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=_into_main_grad(config), **kwargs)


class RowLinear(TERowParallelLinear):
    """A row-parallel linear."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=_into_main_grad(config), **kwargs)


class Fp8Attention(TransformerEngineAttention):
    """Attention in FP8 with delayed scaling, the only recipe that trains on Hopper, whatever recipe the linears have.

    Its scales are updated together with the linears', when the outermost FP8 context ends (precision/context.py).
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.recipe = attention_recipe(config.fp8_amax_history_len)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        with te.fp8_autocast(enabled=True, fp8_recipe=self.recipe, fp8_group=group):
            return super().forward(*args, **kwargs)


class _Activation(torch.autograd.Function):
    """silu(gate) * up of [..., gate | up]. It keeps its input."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        return kernels.swiglu(gate_up, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        return kernels.dswiglu(grad.contiguous(), gate_up, None)


class _Fp8Activation(torch.autograd.Function):
    """As _Activation, cast to FP8 with current scaling for the next linear. Its gradient is cast for the linear before.

    The kernels find the largest value of what they write, in fp32, so the casts read it once.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, recipe: Any, with_gradient: bool) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        ctx.recipe = recipe
        return kernels.swiglu(gate_up, input_quantizer(recipe, columnwise=with_gradient))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        gradient = kernels.dswiglu(grad.contiguous(), gate_up, gradient_quantizer(ctx.recipe))
        return HandedGradient.of(gradient), None, None


class FusedSwiGLU(SwiGLU):
    """The MLP with one kernel each way for its activation.

    torch.compile's backward kernel moves twice as many bytes, and is slower still once it has seen several shapes.
    """

    def _down(self, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        recipe = current_scaling()
        if recipe is None:
            return super()._down(gate_up)
        # selective recompute has nothing to add: what is kept is gate_up and the cast that the linear saves
        with_gradient = torch.is_grad_enabled()
        x = _Fp8Activation.apply(gate_up, recipe, with_gradient)
        y, bias = self.linear_fc2(x)
        if with_gradient:  # as the linear does with casts of its own: its backward pass reads the column-wise one
            x.update_usage(rowwise_usage=False, columnwise_usage=True)
        return y, bias

    def _activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return _Activation.apply(gate_up)


def transformer_engine(precision: PrecisionConfig) -> Backend:
    """Return modules whose linears follow the FP8 context they run in.

    Norms are ours, in front of plain linears. With delayed scaling they are Transformer Engine's, which write FP8: with another
    recipe, and in bf16, they write bf16, and a fused norm and linear saves no bytes.
    """
    backend = Backend(
        name="Transformer Engine",
        column_linear=ColumnLinear,
        norm_column_linear=None,
        row_linear=RowLinear,
        norm=RMSNorm,
        pre_norm=PreNorm,
        attention=Fp8Attention if precision.fp8_attention else TransformerEngineAttention,
        plain_attention=TransformerEngineAttention,
        mlp=FusedSwiGLU,
    )
    return transformer_engine_norms(backend) if precision.norm_casts else backend


def transformer_engine_norms(backend: Backend) -> Backend:
    """Return the backend with Transformer Engine's norms, fused into linears where they are in front of one."""
    return replace(backend, norm_column_linear=NormColumnLinear, norm=TENorm, pre_norm=TENorm)
