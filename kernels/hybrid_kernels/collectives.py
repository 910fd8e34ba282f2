"""Types of the collectives that ops take as callables. The caller binds them to its process groups."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

AllReduce = Callable[[torch.Tensor], object]
"""Reduces a tensor over the ranks, in place. Every rank calls it in the same order."""


@dataclass(frozen=True)
class VocabParallel:
    """Position of this rank among those that share the vocabulary, and their collectives."""

    rank: int
    size: int
    all_reduce_sum: AllReduce
    all_reduce_max: AllReduce
    all_gather: Callable[[torch.Tensor, torch.Tensor], object]
    """all_gather(out, x) fills out [size * n, ...] with x [n, ...] of every rank, in rank order."""
