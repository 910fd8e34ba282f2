"""Fixed-length samples of a token stream, endless, in a new order every epoch."""

import numpy as np

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.permutation import Permutation
from megatron_hybrid.data.sources import TokenSource


class FixedLengthDataset:
    """Dataset of samples of sequence_length + 1 tokens, which begin at every sequence_length tokens of a stream.

    Neighbours share one token, so within an epoch every token but the stream's first is predicted exactly once.
    (OLMo-core's fixed-sequence-length dataset cuts at the same places and predicts one token a sample less.)
    Documents are not kept apart, and what is left at the stream's end, less than a sample, is not used.
    """

    def __init__(self, source: TokenSource, sequence_length: int, seed: int, shuffle: bool = True):
        """Create the dataset of a source. seed: seed of the order. shuffle: False keeps the stream's order in every epoch.

        Raises:
            DataError: the stream is shorter than one sample.
        """
        self.source = source
        self.sequence_length = sequence_length
        self.samples_per_epoch = (source.num_tokens - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{source.name}: {source.num_tokens} tokens do not make one sample: sequence_length {sequence_length} "
                f"needs {sequence_length + 1}. Give more data, or a sequence_length of at most {source.num_tokens - 1}"
            )
        self._seed, self._shuffle = seed, shuffle
        self._order: tuple[int, Permutation] | None = None  # the epoch last asked for

    def position(self, index: int) -> tuple[int, int]:
        """Return epoch and position in the stream of a sample. Indexes are endless."""
        if index < 0:
            raise IndexError(f"sample {index}: must not be negative")
        epoch, i = divmod(index, self.samples_per_epoch)
        if not self._shuffle:
            return epoch, i
        order = self._order  # read once: another thread may be in the next epoch
        if order is None or order[0] != epoch:
            order = self._order = (epoch, Permutation(self.samples_per_epoch, self._seed, epoch))
        return epoch, order[1](i)

    def sample(self, index: int) -> np.ndarray:
        """Return a sample: int64 [sequence_length + 1]."""
        _, place = self.position(index)
        return self.source.read(place * self.sequence_length, self.sequence_length + 1)
