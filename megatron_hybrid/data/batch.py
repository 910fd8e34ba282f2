"""The micro-batch that the data loader yields and the engines train on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch

from megatron_hybrid.data.sample import Sample, SampleCounts, cu_seqlens_of

_PER_TOKEN = ("tokens", "labels", "loss_mask")


@dataclass(frozen=True)
class Batch:
    """Sequences of one micro-batch: b sequences of s tokens."""

    tokens: torch.Tensor
    """int64 [b, s]."""
    labels: torch.Tensor
    """int64 [b, s]: the token that follows each token."""
    loss_mask: torch.Tensor
    """float32 [b, s]: the weight of each label in the loss."""
    documents: torch.Tensor | None = None
    """int32 [b, s]: index in its sequence of the first token of each token's document (distributed/documents.py). A slice for context
    parallelism keeps those of whole sequences. None: the sequences are not split into documents."""
    cu_seqlens: torch.Tensor | None = None
    """int32 [capacity + 1]: boundaries of the documents of all whole sequences, padded with empty documents (data/sample.py)."""
    counts: SampleCounts | None = None
    """What the slots of the whole sequences hold. None: every label has weight 1."""
    sources: torch.Tensor | None = None
    """float32 [b, number of sources]: 1 at the source of the blend that a sequence comes from. None: the loader names no sources."""

    @classmethod
    def of_samples(cls, samples: torch.Tensor) -> Self:
        """Return the batch of samples [b, s + 1], in which every label has weight 1."""
        labels = samples[:, 1:].contiguous()
        return cls(samples[:, :-1].contiguous(), labels, torch.ones(labels.shape, dtype=torch.float32))

    @classmethod
    def collate(cls, samples: Sequence[np.ndarray | Sample]) -> Self:
        """Return the batch of samples that all are arrays [s + 1], in which every label has weight 1, or all are `Sample`s."""
        plain = [sample for sample in samples if isinstance(sample, np.ndarray)]
        if plain:
            return cls.of_samples(torch.from_numpy(np.stack(plain)))
        with_masks = [sample for sample in samples if isinstance(sample, Sample)]
        tokens, labels, loss_mask = (
            torch.from_numpy(np.stack([getattr(sample, name) for sample in with_masks])) for name in _PER_TOKEN
        )
        starts = [sample.starts for sample in with_masks if sample.starts is not None]
        documents = torch.from_numpy(np.stack(starts)) if starts else None
        cu_seqlens = torch.from_numpy(cu_seqlens_of(np.stack(starts))) if starts else None
        counts = sum((sample.counts for sample in with_masks), SampleCounts())
        return cls(tokens, labels, loss_mask, documents, cu_seqlens, counts)

    def with_sources(self, sources: np.ndarray | None) -> Self:
        """Return the batch with the source of each sequence, as `Blend.sources` names them."""
        return self if sources is None else replace(self, sources=torch.from_numpy(sources))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by field name; fields that are None are omitted."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device. From page-locked memory the copy is asynchronous."""
        return self._with({name: x.to(device, non_blocking=True) for name, x in self.tensors().items()})

    def pin_memory(self) -> Self:
        """Return the batch in page-locked host memory."""
        return self._with({name: x.pin_memory() for name, x in self.tensors().items()})

    def slice(self, rank: int, size: int) -> Self:
        """Return slice `rank` of `size` contiguous slices of every sequence: the tokens of one context parallel rank.

        Raises:
            ValueError: sequences that do not divide into `size` slices.
        """
        if size == 1:
            return self
        length, rest = divmod(self.tokens.shape[1], size)
        if rest:
            raise ValueError(f"sequences of {self.tokens.shape[1]} tokens do not divide into {size} slices")
        part = slice(rank * length, (rank + 1) * length)
        return self._with({name: getattr(self, name)[:, part] for name in _PER_TOKEN})

    def split(self, length: int) -> Self:
        """Return the same tokens as sequences of `length` tokens, which do not see each other.

        Raises:
            ValueError: sequences that do not divide, or that are split into documents.
        """
        count, rest = divmod(self.tokens.shape[1], length)
        if rest or (self.documents is not None and count > 1):
            raise ValueError(f"sequences of {self.tokens.shape[1]} tokens do not divide into whole ones of {length}")
        if count == 1:
            return self
        per_sequence = {
            name: x.repeat_interleave(count, 0) for name, x in self.tensors().items() if name not in _PER_TOKEN
        }
        return self._with(per_sequence | {name: getattr(self, name).reshape(-1, length) for name in _PER_TOKEN})

    def _with(self, changes: Mapping[str, Any]) -> Self:
        return replace(self, **changes)
