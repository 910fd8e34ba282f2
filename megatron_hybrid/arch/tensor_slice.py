"""Rectangular slices of tensors."""

from dataclasses import dataclass
from math import prod
from typing import Protocol, Self


class SupportsNarrow(Protocol):
    """A tensor, or anything else that can be narrowed along a dimension."""

    def narrow(self, dim: int, start: int, length: int, /) -> Self: ...


@dataclass(frozen=True)
class TensorSlice:
    """A rectangular slice of a tensor: its first element and its extent, one number per dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "TensorSlice":
        """Return the slice that covers a tensor of this shape."""
        return cls((0,) * len(shape), shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        """First element past the slice, per dimension."""
        return tuple(start + length for start, length in zip(self.offset, self.shape, strict=True))

    @property
    def index(self) -> tuple[slice, ...]:
        """The slice as an index: `tensor[s.index]`."""
        return tuple(slice(start, stop) for start, stop in zip(self.offset, self.end, strict=True))

    def intersection(self, other: "TensorSlice") -> "TensorSlice | None":
        """Return the elements that both slices contain, or None if there are none."""
        start = tuple(map(max, self.offset, other.offset))
        shape = tuple(stop - first for first, stop in zip(start, map(min, self.end, other.end), strict=True))
        return TensorSlice(start, shape) if all(length > 0 for length in shape) else None

    def relative_to(self, origin: tuple[int, ...]) -> "TensorSlice":
        """Return the same elements, with offsets counted from `origin`."""
        return TensorSlice(tuple(at - first for at, first in zip(self.offset, origin, strict=True)), self.shape)

    def narrow[T: SupportsNarrow](self, tensor: T) -> T:
        """Return the slice of `tensor` as a view."""
        for dim, (start, length) in enumerate(zip(self.offset, self.shape, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor
