"""Builds the watchdog of a run from its configuration."""

from pathlib import Path

from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.distributed.process_groups import LONGEST_WAIT_MINUTES
from megatron_hybrid.train.watchdog.flight_recorder import enable_flight_recorder
from megatron_hybrid.train.watchdog.nvrx import RankMonitor
from megatron_hybrid.train.watchdog.thread import START_S, Limits, Watchdog

_SHORTEST_CPU_START_S = 30.0


def build_watchdog(run_dir: Path, train: TrainConfig) -> Watchdog:
    """Return the watchdog of a run, not started.

    Under NVRx's ft_launcher, which has its own limits, the watchdog reports progress to it and prints hangs, but ends the process
    only if `train.hang_timeout` is set. Call it before the process groups are formed.
    """
    enable_flight_recorder()
    limits = Limits(train.hang_timeout, _start_limit(train))
    monitor = RankMonitor.connect()
    return Watchdog(run_dir / "hangs", limits, monitor, monitor is None or train.hang_timeout is not None)


def collective_timeout(train: TrainConfig) -> float:
    """Return the minutes after which a collective fails by itself: later than the watchdog."""
    return max(
        float(LONGEST_WAIT_MINUTES),
        *(2 * (seconds or 0.0) / 60 for seconds in (train.hang_timeout, train.start_timeout)),
    )


def _start_limit(train: TrainConfig) -> float:
    if train.start_timeout is not None:
        return train.start_timeout
    if train.hang_timeout is not None and not has_cuda():
        return max(train.hang_timeout, _SHORTEST_CPU_START_S)  # nothing is compiled
    return max(START_S, train.hang_timeout or 0.0)
