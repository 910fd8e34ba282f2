"""Order of a dataset's samples: a new permutation every epoch, computed from the sample's index alone."""

from megatron_hybrid.data.permutation import Permutation


class SampleOrder:
    """Maps sample indices 0, 1, 2, ... without end to places in a dataset, each place once per epoch."""

    def __init__(self, samples_per_epoch: int, seed: int, shuffle: bool = True) -> None:
        """Create an order. With shuffle False, every epoch has the dataset's own order."""
        self.samples_per_epoch = samples_per_epoch
        self._seed, self._shuffle = seed, shuffle
        self._permutation: tuple[int, Permutation] | None = None  # of the epoch last asked for

    def position(self, index: int) -> tuple[int, int]:
        """Return (epoch, place) of a sample. Several threads may call this.

        Raises:
            IndexError: a negative index.
        """
        if index < 0:
            raise IndexError(f"sample {index}: must not be negative")
        epoch, i = divmod(index, self.samples_per_epoch)
        if not self._shuffle:
            return epoch, i
        current = self._permutation  # read once: another thread may be in the next epoch
        if current is None or current[0] != epoch:
            current = self._permutation = (epoch, Permutation(self.samples_per_epoch, self._seed, epoch))
        return epoch, current[1](i)
