"""Document boundaries of a micro-batch in the forms that mixers take. Built once per forward pass, without a host synchronization.

`Documents` travels to the mixers as `packed_seq_params`, which megatron-core's stacks, layers and recompute pass through. Models of
megatron-core pass its own PackedSeqParams there, which `from_packed_seq_params` converts.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.distributed.documents import cu_seqlens, positions, slice_starts


@dataclass(frozen=True)
class Documents:
    """Documents of b sequences, of which this context parallel rank holds one slice of s tokens each."""

    starts_bs: torch.Tensor
    """int32 [b, whole length]: index in its sequence of the first token of each token's document."""
    cu_seqlens: torch.Tensor
    """int32 [n + 1]: boundaries of the documents of all whole sequences, which follow each other; empty documents at the end."""
    positions_bs: torch.Tensor
    """int32 [b, s]: tokens of its document before each token of the slice."""

    @classmethod
    def of(cls, starts_bs: torch.Tensor, bounds: torch.Tensor, group: dist.ProcessGroup) -> Self:
        """Return the documents of whole sequences, for this rank's slice.

        Args:
            starts_bs: `Batch.documents`.
            bounds: `Batch.cu_seqlens`. Its length is the largest number of documents.
            group: context parallel ranks.
        """
        return cls(starts_bs, bounds, positions(*slice_starts(starts_bs, group.rank(), group.size())))

    @classmethod
    def of_equal_length(cls, length: int, rows: int, device: torch.device, number: int = 16) -> Self:
        """Return about `number` documents of equal length in each of `rows` whole sequences, to try out attention."""
        each = -(-length // number)
        starts_bs = (torch.arange(length, dtype=torch.int32, device=device) // each * each).expand(rows, -1)
        return cls(starts_bs, cu_seqlens(starts_bs, rows * number), positions(starts_bs))

    @property
    def longest(self) -> int:
        """The most tokens that a document can have: the length of a sequence. The longest document's own length is on the device."""
        return self.starts_bs.shape[1]

    def rotary_angles(self, table: torch.Tensor) -> torch.Tensor:
        """Return the entries of a table of angles [..., positions, 1, 1, d] for the tokens of the slice: [..., s, b, 1, d].

        Tokens beyond the table have its last entry. They are padding after the last document (`from_packed_seq_params`).
        """
        positions_sb = self.positions_bs.t().clamp(max=table.shape[-4] - 1)
        return table[..., positions_sb, 0, 0, :].unsqueeze(-2)


def from_packed_seq_params(packed: PackedSeqParams, tokens: int, rows: int, group: dist.ProcessGroup) -> Documents:
    """Return the documents that megatron-core's PackedSeqParams describe. It is converted once: all layers are passed the same object.

    Boundaries of keys, or padded boundaries, in tensors of their own are compared on the host, which synchronizes.

    Args:
        tokens: tokens of the one sequence in which the documents are packed. Those after the last document are one of their own.
        rows: sequences of the micro-batch.

    Raises:
        UserError: parameters that a mixer would have to ignore.
    """
    if not isinstance(packed, PackedSeqParams):
        raise UserError(f"packed_seq_params: it is a {type(packed).__name__}; give megatron-core's PackedSeqParams")
    ranks = packed.local_cp_size or group.size()
    if rows != 1 or ranks > 1:
        raise UserError(
            f"packed_seq_params: there are {rows} sequences on {ranks} context parallel ranks, and the documents must be packed into "
            "one sequence on one rank; use a micro-batch size and a context_parallel_size of 1"
        )
    version, (known, documents) = _version(packed, tokens), getattr(packed, "_documents", (None, None))
    if documents is None or known != version:
        bounds = _boundaries(packed)
        if packed.max_seqlen_q is not None and len(bounds) > 1:
            fits = (bounds.diff() <= packed.max_seqlen_q).all()
            torch._assert_async(fits, "packed_seq_params: max_seqlen_q is below the length of the longest document")
        starts_bs = _starts(bounds, tokens)
        # len(bounds): one more than the documents, for the tokens after them
        documents = Documents.of(starts_bs, cu_seqlens(starts_bs, len(bounds)), group)
        packed._documents = version, documents
    return documents


_BOUNDARIES = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")


def _version(packed: PackedSeqParams, tokens: int) -> object:
    """Return a value that differs when the parameters have changed, in place too."""
    tensors = [x for name in _BOUNDARIES if (x := getattr(packed, name)) is not None]
    if any(x.is_inference() for x in tensors):
        return object()  # these tensors do not count their changes
    return packed.qkv_format, tokens, [(x.data_ptr(), x._version) for x in tensors]


def _boundaries(packed: PackedSeqParams) -> torch.Tensor:
    """Return the boundaries of documents, the same for queries and keys and without padding in between."""
    bounds = packed.cu_seqlens_q
    if packed.qkv_format != "thd" or bounds is None:
        given = "missing" if bounds is None else "given"
        raise UserError(
            f"packed_seq_params: qkv_format is {packed.qkv_format!r} and cu_seqlens_q {given}; "
            'set qkv_format to "thd" and cu_seqlens_q to the boundaries of the documents'
        )
    for name in _BOUNDARIES[1:]:
        other = getattr(packed, name)
        if other is not None and other is not bounds and not torch.equal(other, bounds):
            raise UserError(
                f"packed_seq_params: {name} differs from cu_seqlens_q, and neither padding between documents nor keys of other "
                "tokens are supported; give the same boundaries, with padding as part of a document whose labels are masked"
            )
    return bounds


def _starts(bounds: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the index of the first token of each token's document: int32 [1, tokens]."""
    orderly = (bounds[0] == 0) & (bounds[-1] <= tokens) & (bounds.diff() >= 0).all()
    torch._assert_async(orderly, f"packed_seq_params: cu_seqlens_q does not rise from 0 to at most {tokens} tokens")
    places = torch.arange(tokens, dtype=bounds.dtype, device=bounds.device)
    number = torch.searchsorted(bounds, places, right=True) - 1
    return bounds[number].to(torch.int32)[None]
