"""Disturb the timing of ranks: random delays around every exchange, and a planted race that shows whether they would find one."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules

SHARES, MEAN, LATE = (0.02, 0.2, 0.5), 2e-3, 5e-2
"""Shares of calls that are delayed; the mean delay; and the delay of a late receive. Seconds."""


class Delays:
    """Sleeps at random. The seed decides whether a rank is slow or fast, and when it sleeps."""

    def __init__(self, seed: str):
        self._random = random.Random(seed)
        self._share = self._random.choice(SHARES)

    def short(self) -> None:
        """Sleep for about MEAN, or not at all."""
        if self._random.random() < self._share:
            time.sleep(self._random.expovariate(1 / MEAN))

    def late(self) -> None:
        """Sleep for LATE, or not at all."""
        if self._random.random() < self._share:
            time.sleep(LATE)


@contextmanager
def delayed_exchanges(seed: str) -> Iterator[None]:
    """Delay the start of every send and receive, and both ends of every wait, for a collective too.

    gloo transmits nothing before the receive is posted. A late receive therefore keeps the sender's buffer in flight.
    """
    delays, send, receive, wait = Delays(seed), dist.isend, dist.irecv, dist.Work.wait

    def delayed(pause, call):
        def after_pause(*args, **kwargs):
            pause()
            return call(*args, **kwargs)

        return after_pause

    def wait_between_pauses(self, *args):
        delays.short()
        done = wait(self, *args)
        delays.short()
        return done

    dist.isend, dist.irecv = delayed(delays.short, send), delayed(delays.late, receive)
    dist.Work.wait = wait_between_pauses
    try:
        yield
    finally:
        dist.isend, dist.irecv, dist.Work.wait = send, receive, wait


class _Unwaited:
    """A send whose wait returns at once."""

    def wait(self) -> bool:
        return True


@contextmanager
def planted_race() -> Iterator[None]:
    """Reuse the memory of a pipeline stage's output without waiting until it is sent."""
    send, deallocate = dist.isend, schedules.deallocate_output_tensor
    in_flight = []

    def send_without_wait(tensor, **kwargs):
        in_flight.append((send(tensor, **kwargs), tensor.detach()))  # a detached tensor keeps the memory
        return _Unwaited()

    def reuse(output, deallocate_pipeline_outputs=False):
        if isinstance(output, torch.Tensor) and output.numel() > 1:
            output.data.fill_(1.0)
        deallocate(output, deallocate_pipeline_outputs)

    dist.isend, schedules.deallocate_output_tensor = send_without_wait, reuse
    try:
        yield
        for work, _ in in_flight:
            work.wait()
    finally:
        dist.isend, schedules.deallocate_output_tensor = send, deallocate


class Stopper(threading.Thread):
    """Stops a random rank for a moment, again and again. Each rank makes a file PID.pid in `folder`."""

    def __init__(self, folder: Path, seed: int = 0):
        super().__init__(daemon=True)
        self.folder, self.stops = folder, 0
        self._random, self._end = random.Random(seed), threading.Event()

    def run(self) -> None:
        while not self._end.wait(self._random.uniform(0.02, 0.2)):
            pids = [int(file.stem) for file in self.folder.glob("*.pid")]
            if pids:
                self._hold(self._random.choice(pids), self._random.uniform(0.005, 0.15))

    def _hold(self, pid: int, seconds: float) -> None:
        try:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(seconds)
            os.kill(pid, signal.SIGCONT)
            self.stops += 1
        except ProcessLookupError:  # it has ended
            return

    def __enter__(self) -> "Stopper":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self.join()
