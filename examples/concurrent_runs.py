"""Training runs side by side on the GPUs of a machine or on its CPU, for examples that train grids of small models.

- `Run`: a configuration of the trainer with a folder of its own.
- `Scheduler`: keeps all GPUs busy with several runs each, until they are finished, a time limit, or a signal.
- `train_all`: does so for a list of runs. The folder of each run says where it trained (benchmarks/origins.py).
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from multi_process_service import multi_process_service
from origins import Origin, gpu_name, origin_of_process, write_origin

from megatron_hybrid.base.errors import REQUEUE, no_traceback
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.observe.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine")
"""Packages whose versions a run records."""
STOPPING_S = 20.0
"""Seconds before the time limit at which runs are asked to save and stop."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a grid."""

    model: str
    overrides: tuple[str, ...]
    config: RunConfig
    task: Path

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def is_finished(self) -> bool:
        path = self.folder / "metrics.jsonl"
        steps = [record["step"] for record in read_metrics(path)] if path.exists() else []
        return bool(steps) and steps[-1] >= self.config.train.steps

    def start(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start the run. Its output goes to log.txt in its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "tools/pretrain.py", str(self.task), *self.overrides]
        with open(self.folder / "log.txt", "ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


class Scheduler:
    """Keeps every slot of the GPUs, or of the CPU, busy with a run.

    Args:
        origin: what the folders of the runs say of this machine.
        service: variables of `multi_process_service`.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        gpus: int,
        per_device: int,
        deadline: float,
        origin: Origin,
        service: Mapping[str, str] | None = None,
    ) -> None:
        self.origin, self.service = origin, service or {}
        self.waiting = [run for run in runs if not run.is_finished]
        self.slots = [number % max(gpus, 1) for number in range(max(gpus, 1) * per_device)]
        self.gpus, self.deadline, self.stopping = gpus, deadline, False
        self.running: dict[Run, tuple[subprocess.Popen[bytes], int]] = {}
        self.failed: list[Run] = []

    def work(self) -> None:
        """Train until all runs are finished, or until the deadline or a signal. All runs have ended on return."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        while self.running or (self.waiting and not self.stopping):
            while self.waiting and self.slots and not self.stopping:
                self._start(self.waiting.pop(0), self.slots.pop(0))
            time.sleep(0.5)
            if time.monotonic() > self.deadline:
                self.stop()
            for run, (process, slot) in list(self.running.items()):
                if process.poll() is not None:
                    self._end(run, process.returncode, slot)

    def stop(self) -> None:
        """Ask all runs to save and stop, once."""
        if not self.stopping:
            self.stopping = True
            for process, _ in self.running.values():
                process.send_signal(signal.SIGTERM)

    def _start(self, run: Run, slot: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | self.service
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot) if self.service else _visible_gpus()[slot]
        self.running[run] = run.start(environment), slot
        write_origin(run.folder, self.origin)

    def _end(self, run: Run, status: int, slot: int) -> None:
        del self.running[run]
        self.slots.append(slot)
        if status == 0:
            print(f"{run.folder.name}: finished", flush=True)
        elif not (self.stopping and status in (REQUEUE, -signal.SIGTERM)):
            self.failed.append(run)
            print(f"{run.folder.name}: failed with status {status}; see {run.folder / 'log.txt'}", flush=True)


def train_all(runs: Sequence[Run], gpus: int, per_device: int, deadline: float, mps: bool) -> list[Run]:
    """Train all runs that are not finished, until the deadline, and return those that failed.

    Args:
        per_device: runs side by side on a GPU, or on the CPU.
        mps: runs share a GPU at the same time (multi_process_service.py).
    """
    with no_traceback(), multi_process_service(mps) as service:
        origin = origin_of_process(PACKAGES, gpu_name() if gpus else None)
        scheduler = Scheduler(runs, gpus, per_device, deadline - STOPPING_S, origin, service)
        print(f"{len(runs)} runs, {len(runs) - len(scheduler.waiting)} of them finished before", flush=True)
        scheduler.work()
    return scheduler.failed


def _visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(64)]
