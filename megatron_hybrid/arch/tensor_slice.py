"""A region of a tensor."""

from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True)
class TensorSlice:
    """A box of a tensor: where it begins and its shape, one entry per dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def intersection(self, other: "TensorSlice") -> "TensorSlice | None":
        """Return the region that both have, or None where they do not meet."""
        ends = [
            (max(a, b), min(a + m, b + n))
            for a, b, m, n in zip(self.offset, other.offset, self.shape, other.shape, strict=True)
        ]
        if any(start >= stop for start, stop in ends):
            return None
        return TensorSlice(tuple(start for start, _ in ends), tuple(stop - start for start, stop in ends))

    def relative_to(self, other: "TensorSlice") -> "TensorSlice":
        """Return the same region with offsets counted from where `other` begins."""
        return TensorSlice(tuple(a - b for a, b in zip(self.offset, other.offset, strict=True)), self.shape)

    def narrow(self, tensor: Any) -> Any:
        """Return the region as a view of `tensor`, which has torch's `narrow`."""
        for dim, (start, length) in enumerate(zip(self.offset, self.shape, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor
