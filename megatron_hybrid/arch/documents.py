"""Work of attention on documents: the attended length, by which planner, `--dry-run` and MFU count it.

The attended length of a sequence is the mean over its tokens of the length of their document's part in it: sum(l^2) / sum(l).
Causal attention on parts of lengths l costs as much as on sequences of this length. With a sliding window this is an upper bound.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp
from statistics import NormalDist

ASSUMED_LENGTH = 1000
"""Mean tokens of a document where nothing is known."""
LOG_DEVIATION = 1.27
"""Standard deviation of the logarithm of a document's length: a median of 400 tokens gives a mean of 900, as in web text."""
_QUANTILES = 4096


@dataclass(frozen=True)
class AttendedLength:
    """Attended length in tokens, and its origin in words."""

    tokens: int
    origin: str


def attended_length(lengths: Iterable[float], sequence_length: int, packed: bool) -> float:
    """Return the attended length of documents of these lengths.

    Args:
        packed: only documents longer than a sequence are split. False: sequences are cut from the stream of documents, at any place
            of a document.
    """
    of_document = _split_square if packed else _cut_square
    total = squares = 0.0
    for length in lengths:
        total += length
        squares += of_document(length, sequence_length)
    return squares / total


def assumed_attended_length(mean_length: float, sequence_length: int, packed: bool) -> AttendedLength:
    """Return the attended length of documents with log-normal lengths of this mean."""
    normal, center = NormalDist(), -(LOG_DEVIATION**2) / 2
    places = ((i + 0.5) / _QUANTILES for i in range(_QUANTILES))
    lengths = [max(1.0, mean_length * exp(center + LOG_DEVIATION * normal.inv_cdf(place))) for place in places]
    tokens = round(attended_length(lengths, sequence_length, packed))
    return AttendedLength(tokens, f"assuming log-normal lengths with a mean of {mean_length:,.0f} tokens")


def _split_square(length: float, sequence: int) -> float:
    """Return the sum of squares of a document's pieces: whole sequences and a rest."""
    return length // sequence * sequence**2 + (length % sequence) ** 2


def _cut_square(length: float, sequence: int) -> float:
    """Return the expected sum of squares of a document's parts, if cuts are `sequence` apart and their places are random.

    Tokens at a distance d are in the same sequence with probability 1 - d / sequence.
    """
    if length >= sequence:
        return sequence * length - sequence**2 / 3
    return length**2 - length**3 / (3 * sequence)
