"""Layout of chunks in memory, shared by all fast backends."""

from dataclasses import dataclass

import torch

from hybrid_kernels.triton_support import tile_count

CHUNK = 64
"""Tokens per chunk."""


@dataclass(frozen=True)
class Chunks:
    """Positions of chunks. For packed sequences all tables stay on the device, and `count` is only an upper bound."""

    sequences: int
    """Chains that the scans run: packed sequences, or segments of batch rows."""
    length: int
    count: int
    cu: torch.Tensor
    """[n + 2] bounds of packed sequences. The last is repeated, so that chunks past the end find an empty sequence."""
    first: torch.Tensor
    """[n + 1] first chunk of each packed sequence."""
    sequence: torch.Tensor
    """[count] packed sequence of each chunk; n past the last."""
    segments: int = 1
    """Segments per batch row."""
    positions: torch.Tensor | None = None
    """[b, s] position of each token in its document, where rows hold documents (hybrid_kernels/documents.py)."""

    @property
    def per_row(self) -> int:
        return -(-self.length // CHUNK)

    @classmethod
    def of(
        cls,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        segments: int = 1,
        positions: torch.Tensor | None = None,
    ) -> "Chunks":
        batch, length = v.shape[:2]
        if cu_seqlens is None:  # tables unused
            return cls(batch * segments, length, batch * -(-length // CHUNK), v, v, v, segments, positions)
        n = cu_seqlens.numel() - 1
        cu = torch.cat([cu_seqlens, cu_seqlens[-1:]]).to(v.device, torch.int32)
        ends = ((cu[1:-1] - cu[:-2] + CHUNK - 1) // CHUNK).cumsum(0, dtype=torch.int32)
        count = length // CHUNK + min(n, length)
        sequence = torch.searchsorted(ends, torch.arange(count, device=v.device, dtype=torch.int32), right=True)
        first = torch.cat([ends.new_zeros(1), ends])
        return cls(n, length, count, cu, first, sequence.to(torch.int32))

    def states_like(self, v: torch.Tensor, key_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Allocate every chunk's incoming S^T [chunks, H, V, K] and its new values [chunks, H, V, 64]."""
        heads, dim = v.shape[2:]
        return v.new_empty(self.count, heads, dim, key_dim), v.new_empty(self.count, heads, dim, CHUNK)


@dataclass(frozen=True)
class Scores:
    """Results of `prepare`: A (fp16) and P [chunks, H, 64, 64], and G in units of log 2.

    G is [chunks, H, 64] or, with documents, [chunks, H, 3, 64] (prepare.py).
    """

    A: torch.Tensor
    P: torch.Tensor
    G: torch.Tensor

    @classmethod
    def empty(cls, k: torch.Tensor, heads: int, count: int, documents: bool = False) -> "Scores":
        square = (count, heads, CHUNK, CHUNK)
        half = torch.float32 if k.dtype == torch.float32 else torch.float16
        decays = (count, heads, 3, CHUNK) if documents else square[:3]
        return cls(k.new_empty(square, dtype=half), k.new_empty(square), k.new_empty(decays, dtype=torch.float32))


def ends_like(v: torch.Tensor, key_dim: int, chunks: Chunks, transition: bool) -> torch.Tensor:
    """Allocate the final states [n, H, K, V], with the transitions behind them if requested."""
    heads, dim_v = v.shape[2:]
    width = dim_v + 64 * int(tile_count(key_dim)) * transition
    return v.new_empty(chunks.sequences, heads, key_dim, width, dtype=torch.float32)
