"""Document boundaries on the device: `starts` [b, s], and what mixers derive from it without a host synchronization.

`starts[r, i]` is the index in row r of the first token of token i's document (int32). Rows are whole sequences: a context parallel
rank passes its slice of `starts`, whose values keep counting from the beginning of the sequence, and the `offset` of the slice.
docs/development/documents.md gives the reasons for this form.
"""

import torch


def slice_starts(starts_bs: torch.Tensor, rank: int, size: int) -> tuple[torch.Tensor, int]:
    """Return slice `rank` of `size` contiguous slices of every row [b, s / size], and its offset in the row.

    Raises:
        ValueError: rows that do not divide into `size` slices.
    """
    length, rest = divmod(starts_bs.shape[1], size)
    if rest:
        raise ValueError(f"rows of {starts_bs.shape[1]} tokens do not divide into {size} slices")
    return starts_bs[:, rank * length : (rank + 1) * length], rank * length


def positions(starts_bs: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Return the position of each token in its document [b, s], for RoPE."""
    return _places(starts_bs, offset) - starts_bs


def first_tokens(starts_bs: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Return whether each token is the first of its document [b, s]."""
    return starts_bs == _places(starts_bs, offset)


def continues_from_before(starts_bs: torch.Tensor, offset: int) -> torch.Tensor:
    """Return whether the document of each token began before the slice [b, s].

    A state that arrives from the slice before reaches exactly these tokens, and passes through the slice to the next one
    only if the last token is one of them.
    """
    return starts_bs < offset


def valid_halo(starts_bs: torch.Tensor, width: int, offset: int = 0) -> torch.Tensor:
    """Return how many of the `width` tokens before each token are in its document [b, s], for causal convolutions."""
    return positions(starts_bs, offset).clamp(max=width)


def count_documents(starts_bs: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Return the number of documents in all rows, as a scalar tensor. The first token of a slice counts as a first token."""
    return _begins_run(starts_bs, offset).sum()


def cu_seqlens(starts_bs: torch.Tensor, capacity: int, offset: int = 0) -> torch.Tensor:
    """Return the boundaries of the documents of the flattened rows: int32 [capacity + 1].

    Entry i is where document i begins in the b * s tokens. Entries after the last document are b * s: they are empty documents,
    so that the shape does not depend on the data.

    Args:
        capacity: most documents. A device-side assertion fails if there are more.
    """
    begins = _begins_run(starts_bs, offset).flatten()
    tokens = begins.numel()
    number = begins.cumsum(0, dtype=torch.int64) - 1
    torch._assert_async(number[-1] < capacity, f"more than {capacity} documents in a micro-batch")
    bounds = torch.full((capacity + 2,), tokens, dtype=torch.int32, device=starts_bs.device)
    # Tokens that begin no document write to the last entry, which is cut off.
    bounds.scatter_(
        0,
        torch.where(begins, number.clamp(max=capacity), capacity + 1),
        torch.arange(tokens, dtype=torch.int32, device=starts_bs.device),
    )
    return bounds[: capacity + 1]


def _places(starts_bs: torch.Tensor, offset: int) -> torch.Tensor:
    return torch.arange(offset, offset + starts_bs.shape[1], dtype=starts_bs.dtype, device=starts_bs.device)


def _begins_run(starts_bs: torch.Tensor, offset: int) -> torch.Tensor:
    """Return whether each token begins a run of tokens of one document in its row of the slice [b, s]."""
    begins = first_tokens(starts_bs, offset)
    begins[:, 0] = True
    return begins
