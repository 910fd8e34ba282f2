"""Checks that a run makes after all ranks have started, before it builds the model."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_hybrid.checkpoint.folders import checkpoint_step, complete_checkpoints
from megatron_hybrid.checkpoint.removal import remove_remains
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.run_dir import checkpoint_bytes
from megatron_hybrid.data.agreement import refuse, run_disagreements, warn
from megatron_hybrid.data.sources import open_source
from megatron_hybrid.distributed.first_rank import on_first_rank
from megatron_hybrid.distributed.process_groups import stop_distributed
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.preflight import preflight
from megatron_hybrid.launch.start import start_distributed
from megatron_hybrid.train.interrupt import check_restarts
from megatron_hybrid.train.run_lock import RunLock


def check_start(config: RunConfig, launch: Launch) -> None:
    """Check that data, tokenizer and model agree, that the nodes work (preflight), and that restarts make progress.

    Every rank calls it.

    Raises:
        DataError, PreflightError, RestartError: on every rank alike.
    """
    on_first_rank(lambda: warn(refuse(run_disagreements(config.model, config.data))))
    if config.preflight.is_on(launch.world_size):
        run_preflight(config, launch)
    run_dir = Path(config.run_dir)
    on_first_rank(lambda: check_restarts(run_dir, newest_step(run_dir)))


@contextmanager
def run_folder(run_dir: Path) -> Iterator[None]:
    """Lock a run's folder against other runs, and remove the remains of saves that were killed.

    Raises:
        RunFolderError: on every rank alike, where another run holds the folder.
    """
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(RunLock(run_dir))
            remains = remove_remains(run_dir / "checkpoints")
            if remains.removed:
                print(f"removed what killed saves left: {', '.join(remains.removed)}", flush=True)
            for name, reason in remains.kept.items():
                print(f"{name} cannot be removed: {reason}; the run continues and leaves it there", flush=True)

        on_first_rank(enter)
        yield


def run_preflight(config: RunConfig, launch: Launch) -> None:
    """Run the checks of launch/preflight.py for this run.

    Raises:
        PreflightError: on every rank alike.
    """

    def read_data() -> None:
        for source in config.data.files().values():
            tokens = open_source(source, config.model.vocab_size)
            tokens.read(0, 1)
            tokens.read(tokens.num_tokens - 1, 1)

    preflight(config.preflight, launch, Path(config.run_dir), checkpoint_bytes(config), read_data)


def preflight_alone(config: RunConfig, launch: Launch) -> None:
    """Join the other ranks, run the preflight, and leave: the work of megatron-hybrid preflight.

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
    """Return the step from which the run would resume; 0 if it has no checkpoint."""
    found = complete_checkpoints(run_dir / "checkpoints")
    return (checkpoint_step(found[-1]) or 0) if found else 0
