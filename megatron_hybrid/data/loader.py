"""Data loader: yields the micro-batches of a global batch for one data parallel rank.

A global batch is the samples [consumed, consumed + global_batch_size) of the dataset. Let each micro-batch have b
sequences. Micro-batch m of rank r of d then holds the b samples from consumed + (m * d + r) * b on. The samples of a
step therefore do not depend on the number of ranks or micro-batches. To resume, only consumed_samples has to be saved.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.blend import Blend
from megatron_hybrid.data.sample import Sample


class Dataset(Protocol):
    """Source of samples: a `Blend`, or one of its datasets."""

    sequence_length: int

    def sample(self, index: int) -> np.ndarray | Sample:
        """Return int64 [sequence_length + 1] or a `Sample`, for any index from 0. Several threads call this."""
        ...


class BatchLoader:
    """Reads the micro-batches of one data parallel rank, ahead of the training loop."""

    def __init__(
        self,
        dataset: Dataset,
        micro_batch_size: int,
        *,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        num_workers: int = 1,
        read_ahead: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Create a loader of a dataset for one rank.

        Args:
            num_workers: reader threads; 0 reads in the calling thread.
            read_ahead: micro-batches to hold ready; None: two per thread, at least 4.
            pin_memory: put batches into page-locked memory, from which copies to a GPU are asynchronous.

        Raises:
            ValueError: a size below 1, or a rank outside the size.
        """
        if micro_batch_size < 1 or not 0 <= data_parallel_rank < data_parallel_size or num_workers < 0:
            raise ValueError(
                f"micro_batch_size {micro_batch_size}, data parallel rank {data_parallel_rank} of "
                f"{data_parallel_size}, num_workers {num_workers}: at least 1, a rank below the size, at least 0"
            )
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self._first = data_parallel_rank * micro_batch_size
        self._stride = data_parallel_size * micro_batch_size
        self._pin_memory = pin_memory
        self._read_ahead = max(1, read_ahead or max(4, 2 * num_workers))
        self._pool = ThreadPoolExecutor(num_workers, "data") if num_workers else None
        self._ready: deque[tuple[int, Future[Batch]]] = deque()  # (first sample, batch)
        self._closed = False

    def num_micro_batches(self, global_batch_size: int) -> int:
        """Return the number of micro-batches per rank in a global batch. Raises ValueError if it does not divide."""
        count, rest = divmod(global_batch_size, self._stride)
        if rest or count < 1:
            nearest = max(1, round(global_batch_size / self._stride)) * self._stride
            raise ValueError(
                f"global_batch_size {global_batch_size} is no multiple of micro_batch_size × data parallel size = "
                f"{self._stride}: nearest is {nearest}"
            )
        return count

    def global_batch(self, consumed_samples: int, global_batch_size: int) -> Iterator[Batch]:
        """Return this rank's micro-batches of the global batch that begins at sample consumed_samples.

        A call that continues where the last one ended uses the micro-batches that were read ahead, whatever the batch
        sizes. Any other call discards them and reads its own.

        Raises:
            ValueError: a negative start, a size that does not divide, or a closed loader. The iterator raises an error
                of a reader thread (such as a DataError for a token outside the vocabulary) at that micro-batch.
        """
        if self._closed:
            raise ValueError("the loader is closed")
        if consumed_samples < 0:
            raise ValueError(f"consumed_samples {consumed_samples}: must not be negative")
        begin = consumed_samples + self._first
        return (self._take(begin + m * self._stride) for m in range(self.num_micro_batches(global_batch_size)))

    def _take(self, start: int) -> Batch:
        if self._pool is None:
            return self._read(start)
        if self._closed:
            raise ValueError("the loader is closed")
        if not self._ready or self._ready[0][0] != start:
            self._drop()
        while len(self._ready) < self._read_ahead:
            # The micro-batches of a rank are one stride apart, across global batches of any size.
            following = self._ready[-1][0] + self._stride if self._ready else start
            self._ready.append((following, self._pool.submit(self._read, following)))
        _, future = self._ready.popleft()
        last = self._ready[-1][0] if self._ready else start
        self._ready.append((last + self._stride, self._pool.submit(self._read, last + self._stride)))
        return future.result()

    def _read(self, start: int) -> Batch:
        """Read the micro-batch whose first sample is `start`."""
        try:
            samples = [self.dataset.sample(start + i) for i in range(self.micro_batch_size)]
        except UserError as error:
            error.printed_by = "each rank"  # the others read other samples
            raise
        batch = Batch.collate(samples)
        if isinstance(self.dataset, Blend):
            batch = batch.with_sources(self.dataset.sources(start, self.micro_batch_size))
        return batch.pin_memory() if self._pin_memory else batch

    def discard_read_ahead(self) -> None:
        """Discard the micro-batches that were read ahead: samples that were not trained on are no longer what they were."""
        self._drop()

    def _drop(self) -> None:
        for _, future in self._ready:
            future.cancel()
        self._ready.clear()

    def close(self) -> None:
        """Stop reading ahead and end the threads. A closed loader cannot be used again."""
        self._closed = True
        self._drop()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
