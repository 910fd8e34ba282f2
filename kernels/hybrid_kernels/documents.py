"""Documents in a row of tokens, as all ops take them: `positions_bs`.

positions_bs[r, i] (int32 [b, s]) is the number of tokens of its document before token i of row r. A row may be one slice of a
longer sequence. Then positions keep counting from the slice before: where position > i, the document began before the slice, and
the halo or the state that arrives reaches token i. No op depends on the number of documents, in shapes, launches or memory.
"""

import torch


def check_bounds(cu_seqlens: torch.Tensor, length: int) -> None:
    """Check that sequences cover a row, without a synchronization on GPUs. Tokens of no sequence would have no output.

    Raises:
        RuntimeError: on CPU; on a GPU, a device-side assertion fails.
    """
    torch._assert_async(
        (cu_seqlens[0] == 0) & (cu_seqlens[-1] == length),
        f"cu_seqlens: the sequences do not cover the row of {length} tokens; give padding at its end a sequence of its own",
    )


def positions_from_cu_seqlens(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """Return positions_bs [1, length] of documents in one row, without a host synchronization.

    Args:
        cu_seqlens: int [n + 1], bounds of the documents, from 0 to `length`. Documents may be empty.
    """
    bounds = cu_seqlens.long()
    token = torch.arange(length, device=cu_seqlens.device)
    document = torch.searchsorted(bounds, token, right=True) - 1
    return (token - bounds[document]).to(torch.int32)[None]


def check_positions(positions_bs: torch.Tensor | None, batch: int, length: int) -> None:
    """Raise ValueError unless positions are None or int32 [batch, length]."""
    if positions_bs is None:
        return
    if tuple(positions_bs.shape) != (batch, length) or positions_bs.dtype != torch.int32:
        found = f"{positions_bs.dtype} {tuple(positions_bs.shape)}"
        raise ValueError(f"positions_bs: expected int32 [b, s] = {(batch, length)}, got {found}")
