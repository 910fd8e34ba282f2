"""Run a function on several gloo ranks. The processes are started once a test session and reused: megatron-core takes
seconds to import. Jobs are module-level functions; their results come back as plain values and tensors.
"""

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

_PRELOAD = ["torch", "megatron_hybrid.train.trainer", "tests.jobs"]


def _worker(rank: int, inbox, outbox) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while (job := inbox.get()) is not None:
        function, kwargs, world_size, store = job
        try:
            if world_size > rank:
                dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
                outbox.put((rank, True, function(**kwargs)))
        except BaseException:  # noqa: BLE001 - reported to the test
            outbox.put((rank, False, traceback.format_exc()))
        finally:
            from megatron_hybrid.parallel.launch import stop_distributed

            stop_distributed()


class RankPool:
    """Up to `size` ranks, idle between jobs."""

    def __init__(self, size: int = 4):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._outbox = context.Queue()
        self._inboxes = [context.Queue() for _ in range(size)]
        self._processes = [
            context.Process(target=_worker, args=(rank, inbox, self._outbox), daemon=True)
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable, world_size: int, timeout: float = 300, **kwargs: Any) -> list[Any]:
        """function(**kwargs) on ranks 0 .. world_size - 1; their results in rank order. A failing rank fails the test."""
        with tempfile.TemporaryDirectory() as folder:
            for inbox in self._inboxes[:world_size]:
                inbox.put((function, kwargs, world_size, f"{folder}/store"))
            results: dict[int, Any] = {}
            while len(results) < world_size:
                rank, fine, value = self._outbox.get(timeout=timeout)
                if not fine:
                    self.close()
                    raise AssertionError(f"rank {rank} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(world_size)]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
