"""FP8 tensors with current scaling that kernels hand to Transformer Engine's linears, which then cast nothing.

A linear's own cast reads its bf16 input twice: for the largest absolute value, and for the cast. A kernel that writes the input can
find that value on the way. Linears take a Float8Tensor for an input and for the gradient of their output, so the FP8 tensor itself
is what is handed over. Transformer Engine 2.20 ignores `use_existing_amax` of its quantizer.
"""

from typing import Any

import torch
from transformer_engine.pytorch.quantization import FP8GlobalStateManager, get_fp8_te_dtype
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Tensor


def current_scaling() -> Any:
    """Return the recipe of linears that run now, if they cast inputs and gradients with current scaling. Else None."""
    if not FP8GlobalStateManager.is_fp8_enabled():
        return None
    recipe = FP8GlobalStateManager.get_fp8_recipe()
    return recipe if recipe.float8_current_scaling() and recipe.backward_override is None else None


def input_quantizer(recipe: Any, columnwise: bool) -> Float8CurrentScalingQuantizer:
    """Return a quantizer for the input of a linear that does not gather it, as its own is.

    Args:
        columnwise: also write what the GEMM of the weight's gradient reads.
    """
    return _quantizer(recipe, recipe.fp8_quant_fwd_inp, forward=True, columnwise=columnwise)


def gradient_quantizer(recipe: Any) -> Float8CurrentScalingQuantizer:
    """Return a quantizer for the gradient of the output of a linear that does not gather it, as its own is."""
    return _quantizer(recipe, recipe.fp8_quant_bwd_grad, forward=False, columnwise=True)


def _quantizer(recipe: Any, given: Any, *, forward: bool, columnwise: bool) -> Float8CurrentScalingQuantizer:
    return Float8CurrentScalingQuantizer(
        get_fp8_te_dtype(recipe, fprop_tensor=forward),
        device=torch.device("cuda"),
        columnwise=columnwise,
        force_pow_2_scales=given.power_2_scale,
        amax_epsilon=given.amax_epsilon,
    )


class HandedGradient(Float8Tensor):
    """The gradient of a linear's output [..., n], cast row-wise and column-wise.

    A linear flattens its gradient by `reshape` (base.py, grad_output_preprocess). Float8Tensor's drops the column-wise cast of a
    tensor with more than two dimensions, which the linear would make again from the row-wise one.
    """

    @classmethod
    def of(cls, gradient: Float8Tensor) -> "HandedGradient":
        return _copy(cls, gradient, gradient.shape, gradient._data, gradient._transpose)

    def reshape(self, *shape: Any) -> Float8Tensor:
        """Return [tokens, n] with both casts, for `reshape((-1, n))`. Nothing else calls it."""
        n = self.shape[-1]
        if shape != ((-1, n),):
            raise ValueError(f"a gradient in FP8 was handed to a reader that reshapes {tuple(self.shape)} to {shape}")
        flat = torch.Size((self.numel() // n, n))
        return _copy(Float8Tensor, self, flat, self._data.view(flat), self._transpose.view(flat[::-1]))

    def dequantize(self, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the values. Transformer Engine's kernels know its own class only."""
        return self.reshape((-1, self.shape[-1])).dequantize(dtype=dtype).view(self.shape)


def _copy(kind: type, tensor: Float8Tensor, shape: torch.Size, data: torch.Tensor, transpose: torch.Tensor) -> Any:
    """Return a tensor of this class with the values and scale of another."""
    return kind(
        shape=shape,
        dtype=tensor.dtype,
        data=data,
        data_transpose=transpose,
        fp8_scale_inv=tensor._scale_inv,
        fp8_dtype=tensor._fp8_dtype,
        quantizer=tensor._quantizer,
        device=tensor.device,
    )
