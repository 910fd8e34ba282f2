"""Comparison of tensors by value, across the types they are stored in."""

from enum import IntEnum

import torch

from megatron_hybrid.checkpoint.open_files import OpenFiles
from megatron_hybrid.checkpoint.safetensors_header import ITEM_BYTES
from megatron_hybrid.convert.io.source import BLOCK_BYTES, TORCH_NAMES, TensorSource

TORCH_DTYPES = {name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items()}
_NARROW_FIRST = ("BF16", "F16", "F32", "F64")


class Difference(IntEnum):
    """Difference of two tensors: none, rounding to the narrower of their types, or values."""

    NONE = 0
    ROUNDING = 1
    VALUES = 2


def rows_limit(a: str, b: str) -> int:
    """Return how many values to read at once from tensors of two types."""
    return BLOCK_BYTES // max(ITEM_BYTES[a], ITEM_BYTES[b])


def compare_blocks(a: memoryview, a_dtype: str, b: memoryview, b_dtype: str) -> Difference:
    """Compare two blocks with the same number of values."""
    x, y = (torch.frombuffer(block, dtype=TORCH_DTYPES[dtype]) for block, dtype in ((a, a_dtype), (b, b_dtype)))
    if a_dtype == b_dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
        return Difference.NONE
    wide = torch.float64 if "F64" in (a_dtype, b_dtype) else torch.float32
    if torch.equal(x.to(wide), y.to(wide)):
        return Difference.NONE
    narrow = TORCH_DTYPES[min(a_dtype, b_dtype, key=_NARROW_FIRST.index)]
    if a_dtype != b_dtype and torch.equal(x.to(narrow), y.to(narrow)):
        return Difference.ROUNDING
    return Difference.VALUES


def compare_tensors(a: TensorSource, b: TensorSource, files: OpenFiles) -> Difference:
    """Compare two tensors of the same shape."""
    limit = rows_limit(a.dtype, b.dtype)
    blocks = (t.blocks(files, limit * ITEM_BYTES[t.dtype]) for t in (a, b))
    return max((compare_blocks(x, a.dtype, y, b.dtype) for x, y in zip(*blocks, strict=True)), default=Difference.NONE)
