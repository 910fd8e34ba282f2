"""Stand-ins for the parts of Transformer Engine 2.20 that the backend imports, on the CPU, where it cannot be installed.

Casts have the scale 448 or 57344 / amax, as current scaling has. Linears are those of linear.py and base.py in FP8, of one rank.
"""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
BACKENDS = "megatron_hybrid.model.backends."
DEPENDENTS = (
    f"{BACKENDS}transformer_engine",
    f"{BACKENDS}current_scaling",
    "megatron_hybrid.mixers.attention.transformer_engine",
)
WRAPPED = (
    "TEColumnParallelLinear",
    "TEDotProductAttention",
    "TELayerNormColumnParallelLinear",
    "TENorm",
    "TERowParallelLinear",
)


class Float8Tensor(torch.Tensor):
    """Row-wise cast `_data` of a tensor [..., n] and column-wise cast `_transpose` [n, ...], as bytes."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, *, shape, dtype, data, data_transpose, fp8_scale_inv, fp8_dtype, quantizer, device):
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._data, self._transpose, self._scale_inv = data, data_transpose, fp8_scale_inv
        self._fp8_dtype, self._quantizer = fp8_dtype, quantizer
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)

    def reshape(self, *shape: Any) -> "Float8Tensor":
        raise AssertionError("it would lose its column-wise cast")

    def update_usage(self, rowwise_usage: bool, columnwise_usage: bool) -> None:
        assert columnwise_usage <= (self._transpose is not None) and rowwise_usage <= (self._data is not None)
        self._data = self._data if rowwise_usage else None
        self._transpose = self._transpose if columnwise_usage else None

    def dequantize(self, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the values of the row-wise cast, or of the column-wise one if it is alone."""
        stored = self._transpose.movedim(0, -1) if self._data is None else self._data
        return (stored.contiguous().view(FORMATS[self._fp8_dtype]).float() * self._scale_inv).to(dtype or self.dtype)


class Quantizer:
    """Float8CurrentScalingQuantizer."""

    def __init__(self, fp8_dtype, device, *, columnwise=True, force_pow_2_scales=False, amax_epsilon=0.0):
        self.dtype, self.columnwise = fp8_dtype, columnwise
        assert (force_pow_2_scales, amax_epsilon) == (False, 0.0), "those of the recipe"

    def __call__(self, x: torch.Tensor) -> Float8Tensor:
        scale = torch.finfo(FORMATS[self.dtype]).max / x.abs().amax().float()
        data = (x.float() * scale).to(FORMATS[self.dtype]).view(torch.uint8)
        transpose = data.movedim(-1, 0).contiguous() if self.columnwise else None
        return Float8Tensor(
            shape=x.shape, dtype=x.dtype, data=data, data_transpose=transpose, fp8_scale_inv=1 / scale,
            fp8_dtype=self.dtype, quantizer=self, device=x.device,
        )  # fmt: skip


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        own = not isinstance(x, Float8Tensor)
        x = Quantizer("e4m3", x.device, columnwise=True)(x) if own else x
        y = F.linear(x.dequantize(), weight)
        if own:
            x.update_usage(rowwise_usage=False, columnwise_usage=True)
        ctx.x, ctx.weight = x, weight
        return y

    @staticmethod
    def backward(ctx, dy):
        dy = dy.reshape((-1, dy.shape[-1]))
        dy = dy if isinstance(dy, Float8Tensor) else Quantizer("e5m2", dy.device)(dy)
        assert type(dy) is Float8Tensor and dy._data.shape == dy.shape and dy._transpose.shape == dy.shape[::-1]
        assert ctx.x._data is None, "the row-wise cast is kept for nothing"
        dx = (dy.dequantize() @ ctx.weight).view(ctx.x.shape)
        dy.update_usage(rowwise_usage=False, columnwise_usage=True)  # so that the column-wise cast is read
        return dx, dy.dequantize().t() @ ctx.x.dequantize().flatten(0, -2)


class Linear(torch.nn.Linear):
    """A linear without a bias, in FP8. It returns (y, None)."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Linear.apply(x, self.weight), None


def swiglu(gate_up: torch.Tensor, quantizer: Quantizer | None) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    y = F.silu(gate) * up
    return y if quantizer is None else quantizer(y)


def dswiglu(grad: torch.Tensor, gate_up: torch.Tensor, quantizer: Quantizer | None) -> torch.Tensor:
    with torch.enable_grad():
        x = gate_up.detach().requires_grad_()
        (dx,) = torch.autograd.grad(swiglu(x, None), x, grad)
    return dx if quantizer is None else quantizer(dx)


def recipe(current_scaling: bool = True, backward_override: str | None = None) -> Any:
    given = SimpleNamespace(power_2_scale=False, amax_epsilon=0.0)
    return SimpleNamespace(
        float8_current_scaling=lambda: current_scaling,
        backward_override=backward_override,
        fp8_quant_fwd_inp=given,
        fp8_quant_bwd_grad=given,
    )


def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put the stand-ins in place of Transformer Engine's modules and return the state of its FP8 contexts.

    `state.recipe` is that of the context in which a test runs; None: there is none.
    """
    state = SimpleNamespace(recipe=None)
    manager = SimpleNamespace(is_fp8_enabled=lambda: state.recipe is not None, get_fp8_recipe=lambda: state.recipe)
    modules: dict[str, dict[str, Any]] = {
        "megatron.core.extensions.transformer_engine": {name: type(name, (torch.nn.Module,), {}) for name in WRAPPED},
        "transformer_engine": {},
        "transformer_engine.pytorch": {},
        "transformer_engine.pytorch.quantization": dict(
            FP8GlobalStateManager=manager,
            get_fp8_te_dtype=lambda recipe, fprop_tensor: "e4m3" if fprop_tensor else "e5m2",
        ),
        "transformer_engine.pytorch.tensor": {},
        "transformer_engine.pytorch.tensor.float8_tensor": dict(
            Float8CurrentScalingQuantizer=Quantizer, Float8Tensor=Float8Tensor
        ),
        "transformer_engine_torch": dict(swiglu=swiglu, dswiglu=dswiglu),
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return state
