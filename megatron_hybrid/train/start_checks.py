"""What a run checks when all its ranks are up, before it builds the model."""

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_hybrid.checkpoint.manager import checkpoint_step, complete_checkpoints
from megatron_hybrid.config.errors import UserError
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.run_dir import checkpoint_bytes
from megatron_hybrid.data.sources import open_source
from megatron_hybrid.parallel.environment import Launch
from megatron_hybrid.parallel.launch import start_distributed, stop_distributed
from megatron_hybrid.parallel.preflight import preflight
from megatron_hybrid.train.interrupt import check_restarts


def check_start(config: RunConfig, launch: Launch) -> None:
    """The preflight, where it is on, and a job that restarts in vain. Every rank calls it.

    Raises:
        PreflightError, RestartError: on every rank alike.
    """
    if config.preflight.is_on(launch.world_size):
        run_preflight(config, launch)
    run_dir = Path(config.run_dir)
    on_first_rank(lambda: check_restarts(run_dir, newest_step(run_dir)))


def run_preflight(config: RunConfig, launch: Launch) -> None:
    """The checks of parallel/preflight.py for this run.

    Raises:
        PreflightError: on every rank alike.
    """

    def read_data() -> None:
        for source in (*config.data.train, *config.data.validation):
            tokens = open_source(source, config.model.vocab_size)
            tokens.read(0, 1)
            tokens.read(tokens.num_tokens - 1, 1)

    preflight(config.preflight, launch, Path(config.run_dir), checkpoint_bytes(config), read_data)


def preflight_alone(config: RunConfig, launch: Launch) -> None:
    """What tools/preflight.py does: join the other ranks, check, leave.

    Raises:
        ConfigError: degrees or batch sizes that do not fit the number of ranks.
        PreflightError: on every rank alike.
    """
    config.check_world(launch.world_size)
    start_distributed(launch, config.parallel, config.train.seed)
    try:
        run_preflight(config, launch)
    finally:
        stop_distributed()


def newest_step(run_dir: Path) -> int:
    """The step that the run would resume from; 0 where it would start anew."""
    found = complete_checkpoints(run_dir / "checkpoints")
    return (checkpoint_step(found[-1]) or 0) if found else 0


def on_first_rank(check: Callable[[], None]) -> None:
    """Run a check on rank 0; what it finds, every rank raises."""
    told: list[UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            check()
        except UserError as error:
            told = [error]
    dist.broadcast_object_list(told)
    if told[0] is not None:
        raise told[0]
