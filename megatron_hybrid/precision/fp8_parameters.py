"""Weights that are held in FP8 alone (precision.fp8_param_gather): Transformer Engine's quantized parameters.

They cannot be read or written piece by piece. Initial values are written to a copy that Transformer Engine keeps beside them until
the optimizer has taken its fp32 weights from it; from then on the optimizer casts those to FP8, after an update, after a
checkpoint is loaded, and once at the start.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from megatron.core.fp8_utils import is_float8tensor


def held_in_fp8(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is one of these; false wherever Transformer Engine is not installed."""
    return is_float8tensor(parameter)


def initial_values(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What initial values are to be written to, of the parameter's shape: itself, or the copy in its nominal dtype, in host memory,
    that one in FP8 has until the optimizer is built."""
    return parameter.get_high_precision_init_val() if held_in_fp8(parameter) else parameter


def forget_last_cast(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Before a cast that is not an update's: delayed scaling takes the largest value of all casts since the last forward pass, and
    the first one was of memory that nothing had been written to."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    for parameter in parameters:
        quantizer = parameter._get_quantizer()
        if isinstance(quantizer, Float8Quantizer):  # delayed scaling's
            quantizer.amax.zero_()


@contextmanager
def casting_rows_alone() -> Iterator[None]:
    """For the optimizer's casts. Transformer Engine 2.20 has each range of flattened fp32 weights cast by a quantizer that also writes
    its transpose, of one column, which nothing reads: on an H100 61 of a step's 780 ms, four layers of the 7B."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    update = Float8Quantizer.update_quantized

    def update_rows(self, *arguments, **options):
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
