"""The micro-batch that the data loader yields and the engines train on."""

from dataclasses import dataclass, fields
from typing import Self

import torch


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
    """Document boundaries. None: the sequences are not split into documents."""

    @classmethod
    def of_samples(cls, samples: torch.Tensor) -> Self:
        """Return the batch of samples [b, s + 1], in which every label has weight 1."""
        labels = samples[:, 1:].contiguous()
        return cls(samples[:, :-1].contiguous(), labels, torch.ones(labels.shape, dtype=torch.float32))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by field name; fields that are None are left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device. From page-locked memory the copy is asynchronous."""
        return type(self)(**{name: x.to(device, non_blocking=True) for name, x in self.tensors().items()})

    def pin_memory(self) -> Self:
        """Return the batch in page-locked host memory."""
        return type(self)(**{name: x.pin_memory() for name, x in self.tensors().items()})

    def slice(self, rank: int, size: int) -> Self:
        """Return slice `rank` of `size` contiguous slices of every sequence: the tokens of one context parallel rank.

        Raises:
            ValueError: sequences that do not divide into `size` slices.
            NotImplementedError: a batch with document boundaries and more than one slice.
        """
        if size == 1:
            return self
        length, rest = divmod(self.tokens.shape[1], size)
        if rest:
            raise ValueError(f"sequences of {self.tokens.shape[1]} tokens do not divide into {size} slices")
        if self.documents is not None:
            raise NotImplementedError("a batch with document boundaries cannot be sliced")
        return type(self)(**{name: x[:, rank * length : (rank + 1) * length] for name, x in self.tensors().items()})
