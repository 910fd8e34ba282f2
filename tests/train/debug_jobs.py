"""Jobs of test_debugging.py, which run on ranks."""

import gc
import io
from contextlib import redirect_stdout
from typing import Any

import torch

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.start import start_distributed
from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome
from megatron_hybrid.train.replicas import ReplicaError, agreed_norm, check_parameters
from megatron_hybrid.train.trainer import Trainer


class WatchGarbage(Callback):
    """Records whether automatic collection is on, and the collections so far, after each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, int]] = []

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        self.seen.append((gc.isenabled(), gc.get_stats()[2]["collections"]))


def debugged(config: dict[str, Any]) -> dict[str, Any]:
    """Train, and return what was seen of the garbage collector, and what was printed."""
    run, watch, printed = RunConfig(**config), WatchGarbage(), io.StringIO()
    groups = start_distributed(Launch.from_environment(), run.parallel, run.train.seed)
    with redirect_stdout(printed), Trainer(run, Launch.from_environment(), groups, callbacks=[watch]) as trainer:
        trainer.run()
    return {"seen": watch.seen, "enabled": gc.isenabled(), "printed": printed.getvalue()}


def compared(bad_rank: int | None) -> tuple[str | None, list[str | float]]:
    """Compare parameters and norms that one rank has changed by one bit. Return the errors, and the agreed norms."""
    import torch.distributed as dist

    rank, group = dist.get_rank(), dist.group.WORLD
    named = [("a", torch.ones(5, dtype=torch.bfloat16)), ("b", torch.arange(6.0))]
    if rank == bad_rank:
        named[1][1].view(torch.int32)[2] ^= 1
    try:
        check_parameters(named, group, step=7)
        error = None
    except ReplicaError as raised:
        error = str(raised)
    norms: list[str | float] = []
    for bad in (1.5, float("nan"), float("inf"), 1.25):
        try:
            norms.append(str(agreed_norm(bad if rank == bad_rank else 1.5, group)))
        except ReplicaError as raised:
            norms.append(str(raised))
    return error, norms
