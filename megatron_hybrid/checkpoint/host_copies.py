"""Copies of a rank's tensors in host memory, from which a checkpoint is written in the background."""

from collections.abc import Iterable

import torch

from megatron_hybrid.checkpoint.writer import SlicedTensor


class HostCopies:
    """Host memory for copies. It is kept from one save to the next: the first use of new memory takes longer than the copy."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def of(self, tensors: Iterable[SlicedTensor]) -> list[SlicedTensor]:
        """Return the tensors with their data copied. Copies of an earlier call are overwritten."""
        copies: list[SlicedTensor] = []
        for number, tensor in enumerate(tensors):
            data = tensor.data.detach()
            tensor.data = self._memory(number, data).copy_(data)
            copies.append(tensor)
        del self._kept[len(copies) :]
        return copies

    def _memory(self, number: int, data: torch.Tensor) -> torch.Tensor:
        """Return memory for the copy with this number, that of earlier saves if it fits."""
        if number < len(self._kept):
            kept = self._kept[number]
            if (kept.shape, kept.dtype) == (data.shape, data.dtype):
                return kept
            del self._kept[number:]
        self._kept.append(torch.empty(data.shape, dtype=data.dtype, device="cpu"))
        return self._kept[-1]
