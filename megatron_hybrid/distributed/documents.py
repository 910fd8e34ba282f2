"""Document boundaries on the device: `starts` [b, s], and what is derived from it without a host synchronization.

`starts[r, i]` is the index in row r of the first token of token i's document (int32). Rows are whole sequences. In a slice for context
parallelism its values still count from the beginning of the sequence, so they come with the `offset` of the slice.
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
    """Return the position of each token in its document [b, s]. A document may have begun before the slice."""
    places = torch.arange(offset, offset + starts_bs.shape[1], dtype=starts_bs.dtype, device=starts_bs.device)
    return places - starts_bs


def cu_seqlens(starts_bs: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return the boundaries of the documents of whole rows that follow each other: int32 [capacity + 1].

    Entry i is where document i begins in the b * s tokens. Entries after the last document are b * s: they are empty documents,
    so that the shape does not depend on the data.

    Args:
        capacity: most documents. A device-side assertion fails if there are more.
    """
    begins = (positions(starts_bs) == 0).flatten()
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
