"""Progress of work that all ranks share, and waiting for it without a time limit.

A collective fails if a rank exceeds its time limit, and a rank that waits in one shows no progress to the watchdog. So the
ranks wait for each other by polling torch.distributed's key-value store.
"""

import itertools
import threading
import time

import torch.distributed as dist

from megatron_hybrid.base.heartbeat import heartbeat

_EVERY_S = 1.0
_FIRST_POLL_S, _LONGEST_POLL_S = 0.01, 1.0
_works = itertools.count()  # every rank counts the same works; the number separates their keys


class SharedProgress:
    """Progress of one work. Every rank creates one at the same point."""

    def __init__(self) -> None:
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.distributed_c10d.PrefixStore(f"shared_progress/{next(_works)}", store)
        self._lock, self._next = threading.Lock(), 0.0

    def advance(self, count: int = 1) -> None:
        """Record progress of this rank. Other ranks see it once a second. Any thread may call it."""
        heartbeat.beat()
        if time.monotonic() > self._next and self._lock.acquire(blocking=False):
            try:
                self._store.add("progress", max(count, 1))
                self._next = time.monotonic() + _EVERY_S
            finally:
                self._lock.release()

    def finish(self) -> None:
        """Record that this rank has done its part."""
        self._store.add("done", 1)

    def wait(self) -> None:
        """Wait until all ranks have called `finish`."""
        pause, seen = _FIRST_POLL_S, -1
        while (done := self._store.add("done", 0)) < dist.get_world_size():
            if (now := done + self._store.add("progress", 0)) != seen:  # other ranks still work
                seen = now
                heartbeat.beat()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL_S)
