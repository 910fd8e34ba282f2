"""Ranks that are threads of one process: thousands of exchanges per second, and one GPU for all ranks."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import torch

from megatron_hybrid.distributed import context_parallel


class ThreadRanks:
    """Process group whose ranks are threads. One runs at a time, because Triton compiles and interprets in one thread only."""

    def __init__(self, size: int):
        self.barrier, self.said, self.mine = threading.Barrier(size, timeout=300), [None] * size, threading.local()
        self.turn = threading.Lock()

    def size(self) -> int:
        return len(self.said)

    def rank(self) -> int:
        return self.mine.rank

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return x of every rank."""
        self.said[self.rank()] = x
        self._wait()
        every = torch.stack(self.said)
        self._wait()
        return every

    def _wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """Return function(rank) of every rank. Meanwhile, context parallel ranks gather from the threads."""

        def work(rank: int) -> Any:
            self.mine.rank = rank
            try:
                with self.turn:
                    return function(rank)
            except BaseException:
                self.barrier.abort()  # the others wait
                raise

        gathering = patch.object(context_parallel, "all_gather", lambda x, group: group.gather(x))
        with gathering, ThreadPoolExecutor(self.size()) as pool:
            return list(pool.map(work, range(self.size())))
