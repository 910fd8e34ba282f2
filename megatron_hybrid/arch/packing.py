"""Packing of the model's true tensors into parameters, and each tensor parallel rank's slices of them.

A parameter of a module packs one or more tensors, holds one rank's slice of each, and may carry padding. Tensor parallel
split, padding, initial values, checkpoints, parameter counts and the planner's sizes all follow from these descriptions.

Padding is exact. Dummy head groups have zero weights, give zero output and receive zero gradient, so they stay zero, and
checkpoints do not hold them. Dummy vocabulary rows are masked out of the softmax.
"""

from dataclasses import dataclass, field, replace
from math import gcd, prod
from typing import Literal

from megatron_hybrid.arch.tensor_slice import TensorSlice

FP8_ALIGNMENT = 16
"""Rows and columns of FP8 matrices are multiples of it. It also keeps bf16 rows 16-byte aligned for Hopper's fast kernels."""

Split = Literal["rows", "columns", "replicated"]


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Initializer:
    """Distribution of a tensor's initial values, by the name under which `mixers/initial_values.py` draws it."""

    distribution: str
    arguments: tuple[float, ...] = ()


NORMAL = Initializer("normal")
"""Mean 0, with the model's `init_std`."""
ONES = Initializer("ones")
ZEROS = Initializer("zeros")


def norm_init(zero_centered: bool) -> Initializer:
    """Return the initial value of a norm's weight, with which the norm multiplies by 1. `zero_centered`: by 1 + weight."""
    return ZEROS if zero_centered else ONES


@dataclass(frozen=True)
class TensorSpec:
    """One true tensor: every layout trains it, and checkpoints hold it, before anything splits, packs or pads it."""

    name: str
    shape: tuple[int, ...]
    """[out, in] for matrices, [channels, taps] for convolutions."""
    init: Initializer = field(default=NORMAL, compare=False)
    decay_group: str = "matrix"
    """Name by which `train.optimizer.no_decay` exempts it from weight decay."""
    always_fp32: bool = False
    """Keep it in fp32 whatever the model's dtype."""

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class PackedSlice:
    """A slice of a true tensor and its place in a parameter of one rank."""

    tensor: TensorSpec
    source: TensorSlice
    """Region of the true tensor."""
    target: TensorSlice
    """Region of the parameter, of the same shape."""
    replicated: bool = False
    """Every tensor parallel rank holds this whole tensor."""
    chunk: tuple[int, ...] = ()
    """Shape of the equal chunks that make up the true tensor, and every rank's slice of it."""


@dataclass(frozen=True)
class PackedParameter:
    """One parameter of a module: the tensors that it packs, and how tensor parallel ranks share them.

    `rows`: a rank's rows of each tensor, one tensor after the other. `columns`: a rank's columns of the single tensor.
    `replicated`: every rank holds the single tensor.
    """

    name: str
    """Path in the module: `in_proj.weight`."""
    tensors: tuple[TensorSpec, ...]
    split: Split = "replicated"
    groups: int = 1
    """Head groups along the split dimension. Each stays whole on one rank."""
    groups_multiple: int = 1
    """A rank's groups are padded to a multiple of it."""
    alignment: int = 1
    """A rank's rows are padded to a multiple of it, at the end."""
    is_gemm: bool = False
    """It is the weight of a linear: FP8 applies to it, and FLOPs are counted."""
    headless: tuple[str, ...] = ()
    """Names of tensors whose rows belong to no head, such as a low-rank projection that all heads read. Ranks share single rows."""

    @property
    def dim(self) -> int:
        """Dimension that tensor parallelism splits."""
        return 1 if self.split == "columns" else 0

    @property
    def numel(self) -> int:
        """True elements, over all ranks."""
        return sum(tensor.numel for tensor in self.tensors)

    def padded_groups(self, ranks: int) -> int:
        """Return the head groups of all ranks together, dummies included."""
        return round_up(self.groups, ranks * self.groups_multiple)

    def padded_size(self, tensor: TensorSpec, ranks: int) -> int:
        """Return the padded extent of `tensor` along the split dimension, over all ranks."""
        if self.split == "replicated":
            return tensor.shape[0]
        if tensor.name in self.headless:
            return round_up(tensor.shape[self.dim], ranks)
        return tensor.shape[self.dim] // self.groups * self.padded_groups(ranks)

    def rank_size(self, tensor: TensorSpec, ranks: int) -> int:
        """Return one rank's extent of `tensor` along the split dimension, padding included."""
        size = self.padded_size(tensor, ranks)
        return size if self.split == "replicated" else size // ranks

    def rank_sizes(self, ranks: int) -> tuple[int, ...]:
        """Return one rank's extent of each tensor along the split dimension, padding included."""
        return tuple(self.rank_size(tensor, ranks) for tensor in self.tensors)

    def rank_shape(self, ranks: int) -> tuple[int, ...]:
        """Return the shape of the parameter on every rank."""
        first = self.tensors[0]
        if self.split == "columns":
            return first.shape[0], self.rank_size(first, ranks)
        return round_up(sum(self.rank_sizes(ranks)), self.alignment), *first.shape[1:]

    def rank_numel(self, ranks: int) -> int:
        """Return the elements of the parameter on every rank, padding included."""
        return prod(self.rank_shape(ranks))

    def slices(self, rank: int, ranks: int) -> tuple[PackedSlice, ...]:
        """Return what `rank` of `ranks` holds. A tensor of which the rank holds only padding is left out."""
        if self.split == "replicated":
            (tensor,) = self.tensors
            whole = TensorSlice((0,) * len(tensor.shape), tensor.shape)
            return (PackedSlice(tensor, whole, whole, replicated=True, chunk=tensor.shape),)
        found, at = [], 0
        for tensor in self.tensors:
            share = self.rank_size(tensor, ranks)
            found += self._slice(tensor, share, rank, at)
            at += share
        return tuple(found)

    def _slice(self, tensor: TensorSpec, share: int, rank: int, at: int) -> list[PackedSlice]:
        size = tensor.shape[self.dim]
        start = min(rank * share, size)
        length = min(start + share, size) - start
        if not length:
            return []
        zeros = (0,) * len(tensor.shape)
        shape = self._along(length, tensor.shape)
        source, target = TensorSlice(self._along(start, zeros), shape), TensorSlice(self._along(at, zeros), shape)
        return [PackedSlice(tensor, source, target, chunk=self._along(gcd(size, share), tensor.shape))]

    def _along(self, size: int, others: tuple[int, ...]) -> tuple[int, ...]:
        """Return `others` with its entry of the split dimension replaced."""
        return (*others[: self.dim], size, *others[self.dim + 1 :])

    def placed(self, module: str, tensors: str) -> "PackedParameter":
        """Return the same parameter below path `module`, with tensors whose names begin with `tensors`."""
        named = tuple(replace(tensor, name=f"{tensors}.{tensor.name}") for tensor in self.tensors)
        headless = tuple(f"{tensors}.{name}" for name in self.headless)
        return replace(self, name=f"{module}.{self.name}", tensors=named, headless=headless)
