"""Run a function on several gloo ranks. Each job has processes of its own, forked from a server that has imported
megatron-core already. Jobs are module-level functions; their results come back as plain values and tensors.
"""

import gc
import multiprocessing as mp
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

from megatron_hybrid.base.permanent_imports import permanent_imports

# pytest, because every process starts by importing what the main program is.
_PRELOAD = ["torch", "pytest", "megatron_hybrid.train.trainer", "testing.jobs"]
# What is imported when a model is built, an optimizer made and a loss drawn: each rank would import it again, for a second or two.
_PRELOAD += ["torch._dynamo", "matplotlib.backends.backend_agg", "matplotlib.figure", "matplotlib.ticker"]
_PRELOAD += [f"megatron_hybrid.mixers.{mixer}.module" for mixer in ("attention", "gated_delta_net")]
_PRELOAD += [
    f"hybrid_kernels.{op}.reference"
    for op in ("conv_gates", "gated_delta_rule", "gated_rmsnorm", "head_norm_rope", "qk_norm_rope", "sigmoid_gate")
]
_OF_SOME = [
    "deepspeed",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("olmo3", "olmo_hybrid", "qwen3_5")),
]
"""What ranks of some tests import. The server leaves out what is not installed."""


def preload() -> None:
    """Import in this process what a run imports, before it forks ranks of its own."""
    with permanent_imports():
        for name in _PRELOAD:
            import_module(name)


def _work(rank: int, world_size: int, store: str, function: Callable, kwargs: dict, outbox, end) -> None:
    import torch
    import torch.distributed as dist

    gc.freeze()  # what the server has imported: no collection looks through it again, or copies its pages
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        result = function(**kwargs)
        assert not (left := mp.active_children()), f"processes are left, which would outlive the tests: {left}"
        outbox.put((rank, True, result))
    except BaseException:  # noqa: BLE001 - reported to the test
        outbox.put((rank, False, traceback.format_exc()))
    end.poll(300)  # tensors in a result are shared memory of this process; and the others may still talk to it
    os._exit(0)  # gloo's threads have nothing left to say


class RankPool:
    """Starts ranks; one server process a test session. `preload`: more modules that the server imports."""

    def __init__(self, *preload: str):
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload([*_PRELOAD, *_OF_SOME, *preload])

    def run(self, function: Callable, world_size: int, timeout: float = 280, **kwargs: Any) -> list[Any]:
        """function(**kwargs) on ranks 0 .. world_size - 1; their results in rank order. A failing rank fails the test."""
        with tempfile.TemporaryDirectory() as folder:
            outbox, (end, held) = self._context.Queue(), self._context.Pipe(duplex=False)
            processes = [
                self._context.Process(
                    target=_work,
                    args=(rank, world_size, f"{folder}/store", function, kwargs, outbox, end),
                    daemon=True,
                )
                for rank in range(world_size)
            ]
            for process in processes:
                process.start()
            try:
                return self._collect(processes, outbox, time.monotonic() + timeout)
            finally:
                held.close()  # no lock to share with processes that may have been killed: they see the pipe end
                for process in processes:
                    process.join(5)
                    process.kill()
                    process.join()

    @staticmethod
    def _collect(processes, outbox, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < len(processes):
            try:
                rank, fine, value = outbox.get(timeout=1)
            except queue.Empty:
                dead = [r for r, p in enumerate(processes) if not p.is_alive() and r not in results]
                if (dead and outbox.empty()) or time.monotonic() > deadline:
                    raise AssertionError(f"ranks {dead} ended without a result, or nothing came in time") from None
                continue
            if not fine:
                for process in processes:
                    process.kill()
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
        return [results[rank] for rank in range(len(processes))]
