"""A tensor parallel rank's slices of true tensors (arch/tensors.py), and how both mixers pack them into their parameters.

A parameter on a rank may pack several tensors (`[q | k | v | gate | b | a]`), hold a slice of each, and carry padding that
belongs to none. Its pieces describe that. Initial weights, both kinds of checkpoints and converters read nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import torch

from megatron_hybrid.arch.model import GatedDeltaNetConfig
from megatron_hybrid.arch.padding import padded_groups, true_part
from megatron_hybrid.arch.tensors import TensorSpec


@dataclass(frozen=True)
class Piece:
    """A box of a true tensor and its place in a parameter of this rank. All in elements, one entry per dimension."""

    tensor: TensorSpec
    offset: tuple[int, ...]
    """Of the box in the true tensor."""
    shape: tuple[int, ...]
    local_offset: tuple[int, ...]
    """Of the box in the parameter."""
    replicated: bool = False
    """Every tensor parallel rank holds this whole tensor."""
    chunk: tuple[int, ...] = ()
    """Shape of the equal chunks of which the true tensor, and every rank's box of it, is a whole number."""

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """The box as a view of the parameter, or of anything of its shape."""
        for dim, (start, length) in enumerate(zip(self.local_offset, self.shape, strict=True)):
            parameter = parameter.narrow(dim, start, length)
        return parameter

    def of_true(self, tensor: torch.Tensor) -> torch.Tensor:
        """The box as a view of the true tensor."""
        for dim, (start, length) in enumerate(zip(self.offset, self.shape, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        return tensor


class TensorSlices:
    """Pieces of true tensors on rank `rank` of `ranks` tensor parallel ranks."""

    def __init__(self, tensors: Mapping[str, TensorSpec], rank: int, ranks: int):
        self.tensors, self.rank, self.ranks = tensors, rank, ranks

    def replicated(self, tensor: str) -> list[Piece]:
        """The whole tensor, on every rank."""
        spec = self.tensors[tensor]
        zeros = (0,) * len(spec.shape)
        return [Piece(spec, zeros, spec.shape, zeros, replicated=True, chunk=spec.shape)]

    def stacked(self, *tensors: tuple[str, int]) -> list[Piece]:
        """Tensors (name, padded rows) split by rows over the ranks, a rank's parts one after the other."""
        pieces, at = [], 0
        for tensor, padded in tensors:
            pieces += self._split(tensor, 0, padded, at)
            at += padded // self.ranks
        return pieces

    def columns(self, tensor: str, padded: int) -> list[Piece]:
        """A matrix split by columns over the ranks."""
        return self._split(tensor, 1, padded, 0)

    def _split(self, tensor: str, dim: int, padded: int, local: int) -> list[Piece]:
        """Nothing where this rank holds only padding."""
        spec = self.tensors[tensor]
        start, length = true_part(spec.shape[dim], padded, self.rank, self.ranks)
        if not length:
            return []

        def along(size: int, others: tuple[int, ...]) -> tuple[int, ...]:
            return (*others[:dim], size, *others[dim + 1 :])

        zeros = (0,) * len(spec.shape)
        chunk = gcd(spec.shape[dim], padded // self.ranks)
        offsets = along(start, zeros), along(length, spec.shape), along(local, zeros)
        return [Piece(spec, *offsets, chunk=along(chunk, spec.shape))]


Pieces = dict[str, list[Piece]]
"""A mixer's parameters by name, with their pieces."""


def gdn_pieces(slices: TensorSlices, gdn: GatedDeltaNetConfig, mixer: str) -> Pieces:
    """Return the pieces of a Gated DeltaNet mixer, whose true tensors' names begin with `mixer`."""
    key_heads, heads = padded_groups(gdn.num_key_heads, gdn.num_value_heads, slices.ranks)
    key, value = key_heads * gdn.key_head_dim, heads * gdn.value_head_dim
    packed = (("q", key), ("k", key), ("v", value), ("gate", value), ("b", heads), ("a", heads))
    return {
        "in_proj.weight": slices.stacked(*((f"{mixer}.{n}_proj.weight", w) for n, w in packed)),
        "conv_weight": slices.stacked(*((f"{mixer}.{n}_conv.weight", w) for n, w in packed[:3])),
        "A_log": slices.stacked((f"{mixer}.A_log", heads)),
        "dt_bias": slices.stacked((f"{mixer}.dt_bias", heads)),
        "o_norm_weight": slices.replicated(f"{mixer}.o_norm.weight"),
        "out_proj.weight": slices.columns(f"{mixer}.o_proj.weight", value),
    }


def attention_pieces(slices: TensorSlices, heads: int, groups: int, d: int, mixer: str) -> Pieces:
    """Return the pieces of an attention mixer of true `heads` and `groups`, `d` wide.

    Its output projection is the linear in a RowParallelLinearWithNorm.
    """
    groups, heads = padded_groups(groups, heads, slices.ranks)
    q, kv = heads * d, groups * d
    return {
        "linear_qkv.weight": slices.stacked(*((f"{mixer}.{n}_proj.weight", w) for n, w in zip("qkv", (q, kv, kv)))),
        "q_norm_weight": slices.stacked((f"{mixer}.q_norm.weight", q)),
        "k_norm_weight": slices.stacked((f"{mixer}.k_norm.weight", kv)),
        "linear_proj.linear.weight": slices.columns(f"{mixer}.o_proj.weight", q),
    }
