"""Micro-batches of a global batch, for one data parallel rank. The one file of `data` where torch is needed.

A global batch is the samples [consumed, consumed + global_batch_size) of the dataset. Micro-batch m of rank r of d,
with b sequences each, takes the b samples from consumed + (m·d + r)·b on. So the samples of a step do not depend on
how many ranks or micro-batches they are spread over, and nothing but consumed_samples need be saved to go on.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from megatron_hybrid.base.errors import UserError

Batch = dict[str, torch.Tensor]


class Dataset(Protocol):
    """Source of samples: a `Blend`, or a `FixedLengthDataset`."""

    sequence_length: int

    def sample(self, index: int) -> np.ndarray:
        """int64 [sequence_length + 1], for any index from 0; called from several threads."""
        ...


class BatchLoader:
    """Reads the micro-batches of one data parallel rank, ahead of the training loop.

    A micro-batch holds, for b sequences of s tokens:
        tokens        int64 [b, s]
        labels        int64 [b, s], the token after each token
        loss_mask     float32 [b, s], ones (see mask_end_of_document)
        position_ids  int64 [b, s], 0 to s - 1
    """

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
        mask_end_of_document: int | None = None,
    ):
        """Create the loader of a dataset for one rank.

        Args:
            num_workers: threads; 0 reads in the caller's.
            read_ahead: micro-batches held ready; None: two a thread, at least 4.
            pin_memory: in page-locked memory, for copies to a GPU that do not wait.
            mask_end_of_document: this token's loss counts 0: what follows it is another document, unforeseeable.

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
        self._pin_memory, self._eod = pin_memory, mask_end_of_document
        self._read_ahead = max(1, read_ahead or max(4, 2 * num_workers))
        self._pool = ThreadPoolExecutor(num_workers, "data") if num_workers else None
        self._ready: deque[tuple[int, Future[Batch]]] = deque()  # by first sample
        self._closed = False

    def num_micro_batches(self, global_batch_size: int) -> int:
        """Micro-batches a rank has in a global batch. Raises ValueError if it does not divide."""
        count, rest = divmod(global_batch_size, self._stride)
        if rest or count < 1:
            nearest = max(1, round(global_batch_size / self._stride)) * self._stride
            raise ValueError(
                f"global_batch_size {global_batch_size} is no multiple of micro_batch_size × data parallel size = "
                f"{self._stride}: nearest is {nearest}"
            )
        return count

    def global_batch(self, consumed_samples: int, global_batch_size: int) -> Iterator[Batch]:
        """This rank's micro-batches of the global batch that begins at sample consumed_samples.

        Going on where the last call ended finds its micro-batches read already, whatever the batch sizes; anything else
        is as right, and reads again.

        Raises:
            ValueError: a negative start, a size that does not divide, or a loader that is closed. An error in a thread,
                such as a DataError that names a token outside the vocabulary, is raised by the iterator, at its micro-batch.
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
            # Micro-batches of a rank follow each other at one stride across global batches of any size.
            following = self._ready[-1][0] + self._stride if self._ready else start
            self._ready.append((following, self._pool.submit(self._read, following)))
        _, future = self._ready.popleft()
        last = self._ready[-1][0] if self._ready else start
        self._ready.append((last + self._stride, self._pool.submit(self._read, last + self._stride)))
        return future.result()

    def _read(self, start: int) -> Batch:
        """The micro-batch whose first sample is start."""
        try:
            samples = np.stack([self.dataset.sample(start + i) for i in range(self.micro_batch_size)])  # [b, s + 1]
        except UserError as error:
            error.printed_by = "each rank"  # the others read other samples
            raise
        samples_bs = torch.from_numpy(samples)
        tokens = samples_bs[:, :-1].contiguous()
        mask = torch.ones(tokens.shape, dtype=torch.float32)
        if self._eod is not None:
            mask[tokens == self._eod] = 0.0
        batch = {
            "tokens": tokens,
            "labels": samples_bs[:, 1:].contiguous(),
            "loss_mask": mask,
            "position_ids": torch.arange(tokens.shape[1]).repeat(tokens.shape[0], 1),
        }
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pin_memory else batch

    def _drop(self) -> None:
        for _, future in self._ready:
            future.cancel()
        self._ready.clear()

    def close(self) -> None:
        """Stop reading ahead and end the threads. The loader cannot be used after."""
        self._closed = True
        self._drop()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
