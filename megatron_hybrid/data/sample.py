"""A sample with its loss mask and document boundaries, as numpy arrays."""

from dataclasses import dataclass, fields, replace

import numpy as np

LEAST_CAPACITY = 16
"""Fewest documents that the boundaries of a micro-batch have room for."""


@dataclass(frozen=True)
class SampleCounts:
    """Numbers of slots by content: `counted + crossing + filtered + padding == slots`."""

    slots: int = 0
    counted: int = 0
    """Tokens whose label counts in the loss."""
    crossing: int = 0
    """Tokens whose label would be in another document."""
    filtered: int = 0
    """Tokens that would count otherwise: of samples that the instance filter excludes from the loss, and those of generated samples
    that are not answers."""
    padding: int = 0
    """Slots without a token of the data."""
    filtered_samples: int = 0

    def __add__(self, other: "SampleCounts") -> "SampleCounts":
        return SampleCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def tokens(self) -> int:
        """Tokens read from the data."""
        return self.slots - self.padding

    def metrics(self) -> dict[str, float]:
        """Return the values to log: shares of the slots, and the number of filtered samples."""
        slots = max(self.slots, 1)
        return {
            "counted_share": self.counted / slots,
            "padding_share": self.padding / slots,
            "filtered_share": self.filtered / slots,
            "filtered_samples": self.filtered_samples,
        }


@dataclass(frozen=True)
class Sample:
    """One sequence of s tokens."""

    tokens: np.ndarray
    """int64 [s]."""
    labels: np.ndarray
    """int64 [s]: the token that follows each token; any token where loss_mask is 0."""
    loss_mask: np.ndarray
    """float32 [s]: the weight of each label in the loss."""
    starts: np.ndarray | None
    """int32 [s]: index in the sample of the first token of each token's document. None: documents are not separated."""
    counts: SampleCounts

    @classmethod
    def of_tokens(cls, tokens: np.ndarray) -> "Sample":
        """Return the sample of tokens [s + 1] that are not separated into documents. Every label counts."""
        length = len(tokens) - 1
        counts = SampleCounts(slots=length, counted=length)
        return cls(tokens[:-1], tokens[1:], np.ones(length, np.float32), None, counts)

    @classmethod
    def empty(cls, length: int, separated: bool) -> "Sample":
        """Return a sample of padding alone.

        Args:
            separated: documents are separated, so that the sample needs `starts`.
        """
        tokens, starts = np.zeros(length, np.int64), np.zeros(length, np.int32) if separated else None
        return cls(tokens, tokens, np.zeros(length, np.float32), starts, SampleCounts(slots=length, padding=length))

    def without_loss(self) -> "Sample":
        """Return the sample, excluded from the loss by the instance filter."""
        counts = replace(self.counts, counted=0, filtered=self.counts.counted, filtered_samples=1)
        return replace(self, loss_mask=np.zeros_like(self.loss_mask), counts=counts)


def starts_of(firsts: np.ndarray, length: int) -> np.ndarray:
    """Return int32 [length]: the last of `firsts` at or before each position.

    Args:
        firsts: ascending positions of the first tokens of documents; position 0 counts whether it is among them or not.
    """
    starts = np.zeros(length, np.int32)
    starts[firsts] = firsts
    return np.maximum.accumulate(starts)


def cu_seqlens_of(starts_bs: np.ndarray) -> np.ndarray:
    """Return the boundaries of the documents of a micro-batch whose rows follow each other: int32 [capacity + 1].

    Entry i is where document i begins in the b * s tokens. The capacity is the number of documents rounded up to a power of two,
    at least `LEAST_CAPACITY`, so that few shapes occur; the entries that are left are b * s, which makes empty documents.

    Args:
        starts_bs: `Sample.starts` of each row, int32 [b, s].
    """
    begins = np.flatnonzero(starts_bs == np.arange(starts_bs.shape[1], dtype=np.int32))
    capacity = max(LEAST_CAPACITY, 1 << (len(begins) - 1).bit_length())
    bounds = np.full(capacity + 1, starts_bs.size, np.int32)
    bounds[: len(begins)] = begins
    return bounds
