"""Weights that are held in FP8 only (precision.fp8_param_gather): Transformer Engine's quantized parameters.

They cannot be read or written piece by piece. Transformer Engine keeps a copy in high precision next to each, to which
initial values are written, until the optimizer has taken its fp32 weights from it. From then on the optimizer casts its
fp32 weights to FP8: once at the start, after every update, and after a checkpoint is loaded.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor


def is_fp8_param(parameter: torch.Tensor) -> bool:
    """Return whether a parameter is held in FP8. False if Transformer Engine is not installed."""
    return bool(is_float8tensor(parameter))


def initial_values(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return the tensor to which initial values are written: the parameter, or the copy of one that is held in FP8.

    The copy has the parameter's shape and nominal dtype and is in host memory.
    """
    if not is_fp8_param(parameter):
        return parameter
    copy: torch.Tensor = parameter.get_high_precision_init_val()  # type: ignore[attr-defined] # Transformer Engine's class
    return copy


def stored_values(parameter: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a parameter that is held in FP8, in rows."""
    held: Any = parameter
    values: torch.Tensor = held._data if getattr(held, "_data", None) is not None else held._rowwise_data
    return values


def reset_amax(parameters: Iterable[Any]) -> None:
    """Reset the amax of delayed scaling before a cast that does not follow an update.

    Delayed scaling takes the largest value of all casts since the last forward pass. The first cast was of uninitialized
    memory.
    """
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    for parameter in parameters:
        quantizer = parameter._get_quantizer()
        if isinstance(quantizer, Float8Quantizer):  # delayed scaling
            quantizer.amax.zero_()


@contextmanager
def rowwise_casts_only() -> Iterator[None]:
    """Make the optimizer's casts skip the transposed copies.

    Transformer Engine 2.20 casts each range of flattened fp32 weights with a quantizer that also writes a transpose of one
    column, which nothing reads. It took 61 of the 780 ms of a step (four layers of the 7B model, one H100).
    """
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    update = Float8Quantizer.update_quantized

    def update_rows(self: Any, *arguments: Any, **options: Any) -> Any:
        columnwise = self.columnwise_usage
        self.set_usage(columnwise=False)
        try:
            return update(self, *arguments, **options)
        finally:
            self.set_usage(columnwise=columnwise)

    Float8Quantizer.update_quantized = update_rows
    try:
        yield
    finally:
        Float8Quantizer.update_quantized = update
