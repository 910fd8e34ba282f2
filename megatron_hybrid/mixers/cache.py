"""The contract of a mixer in inference: what it keeps between calls, and how it continues from there.

A mixer that can generate text sets `has_cache` in its spec. Its folder then has `cache.py`, with
`make_cache(mixer, batch_size, capacity) -> MixerCache`. Training modules know nothing of it.

Sequences of one batch have different lengths. Chunks of prompts are padded on the right. A padding token must not change what a
cache keeps, and nothing depends on its output. Tokens before it never see it, because all mixers are causal.

Suffixes of tensor names: s tokens of a chunk, b sequences, h hidden size, d channels of an attention head.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

CHUNK_MULTIPLE = 8
"""Chunks are padded to a multiple of this many tokens, so they are at least as long as what a short convolution looks back on."""


@dataclass(frozen=True)
class Chunk:
    """Place of a chunk of prompts."""

    start: int
    """Position of its first token, the same in all sequences."""
    lengths_b: torch.Tensor
    """Tokens of each sequence in this chunk. The rest is padding. 0: the sequence ended in an earlier chunk."""
    angles: torch.Tensor | None
    """Rotary angles of its positions, as the model passes them to mixers in training."""


@dataclass(frozen=True)
class Step:
    """Place of the next token of each sequence."""

    positions_b: torch.Tensor
    angles: torch.Tensor | None
    """Rotary angles, with one entry per sequence where Chunk has one per token."""


class MixerCache(ABC):
    """State of one layer's mixer for a batch of sequences. Its tensors keep their addresses, so that CUDA graphs can use them."""

    @abstractmethod
    def extend(self, x_sbh: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Return the mixer's output for a chunk of prompts, and keep what later tokens need."""

    @abstractmethod
    def step(self, x_1bh: torch.Tensor, step: Step) -> torch.Tensor:
        """Return the mixer's output for one more token of each sequence, without a synchronization of host and device."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all sequences."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Size of its tensors."""


def keep_tail(tail_tbw: torch.Tensor, x_sbw: torch.Tensor, lengths_b: torch.Tensor) -> None:
    """Overwrite a convolution's last inputs with those after a chunk of prompts.

    Args:
        tail_tbw: the last t tokens before the chunk.
        x_sbw: the convolution's inputs in the chunk, padded.
        lengths_b: tokens of each sequence in the chunk.
    """
    seen = torch.cat((tail_tbw, x_sbw))
    last = torch.arange(len(tail_tbw), device=seen.device)[:, None] + lengths_b
    tail_tbw.copy_(seen[last, torch.arange(seen.shape[1], device=seen.device)])
