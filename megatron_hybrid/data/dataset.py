"""Fixed-length samples of a token stream, endless, in a new order every epoch."""

import numpy as np

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.order import SampleOrder
from megatron_hybrid.data.sources import TokenSource


class FixedLengthDataset:
    """Dataset of samples of sequence_length + 1 tokens, which begin at every sequence_length tokens of a stream.

    Adjacent samples share one token, so that every token except the stream's first is predicted exactly once per epoch.
    (OLMo-core's fixed-sequence-length dataset cuts at the same places and predicts one token fewer per sample.)
    Documents are not separated. An incomplete sample at the end of the stream is not used.
    """

    def __init__(self, source: TokenSource, sequence_length: int, seed: int, shuffle: bool = True) -> None:
        """Create a dataset of a source.

        Args:
            seed: of the order.
            shuffle: False: the stream's order in every epoch.

        Raises:
            DataError: the stream is shorter than one sample.
        """
        self.source = source
        self.sequence_length = sequence_length
        self.samples_per_epoch = count_stream_samples(source, sequence_length)
        self._order = SampleOrder(self.samples_per_epoch, seed, shuffle)

    @property
    def name(self) -> str:
        """Name of the source."""
        return self.source.name

    def position(self, index: int) -> tuple[int, int]:
        """Return epoch and position in the stream of a sample. Indexes are endless."""
        return self._order.position(index)

    def sample(self, index: int) -> np.ndarray:
        """Return a sample: int64 [sequence_length + 1]."""
        _, place = self.position(index)
        return self.source.read(place * self.sequence_length, self.sequence_length + 1)


def count_stream_samples(source: TokenSource, sequence_length: int) -> int:
    """Return the number of samples in a stream.

    Raises:
        DataError: the stream is shorter than one sample.
    """
    samples = (source.num_tokens - 1) // sequence_length
    if samples < 1:
        raise DataError(
            f"{source.name}: {source.num_tokens} tokens do not make one sample: sequence_length {sequence_length} "
            f"needs {sequence_length + 1}. Give more data, or a sequence_length of at most {source.num_tokens - 1}"
        )
    return samples
