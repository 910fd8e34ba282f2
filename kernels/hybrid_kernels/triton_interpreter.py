"""Repairs of Triton 3.6's CPU interpreter (TRITON_INTERPRET=1), in which the CPU tests run these kernels."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor
_create_dot = interpreter.InterpreterBuilder.create_dot


def repair() -> None:
    """Install the repairs. Idempotent."""
    interpreter._patch_lang_tensor = _patch_tensor_index
    interpreter.InterpreterBuilder.create_dot = _dot


def _patch_tensor_index(tensor, scope) -> None:
    """Work around interpreter.py:888, which calls int() on a one-element array; numpy >= 2.4 refuses that."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Work around interpreter.py:628, which multiplies bf16 operands as the 16-bit integers that hold their bits."""
    return _create_dot(self, _as_fp32(a), _as_fp32(b), d, input_precision, max_num_imprecise_acc)


def _as_fp32(handle):
    if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != np.uint16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
