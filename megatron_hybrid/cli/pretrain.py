"""Train a model: `megatron-hybrid launch pretrain CONFIG.yaml [section.key=value ...]`.

`megatron-hybrid launch` starts one rank per GPU of this node. The ranks may as well be started by
`torchrun --nproc-per-node 4 --no-python`, `mpirun -n 4`, `srun` or `srun --mpi=pmix`, each followed by `megatron-hybrid pretrain`.
On SIGUSR1, SIGTERM or Ctrl-C every rank saves the same step and stops; the same command resumes from there. Further
signals change nothing. SIGQUIT prints the stacks of all threads. Options and overrides may come in any order.
Exit codes: 0 done; 75 to be resumed: stopped by a signal, after a hang, or because ranks differ; 78 wrong command line,
configuration, data, checkpoint or node. torchrun makes 1 of every status but 0, and gives ranks 30 seconds after SIGTERM;
megatron-hybrid launch keeps the status, and waits for the ranks.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hybrid.base.output import tolerate_output_errors
from megatron_hybrid.launch import stop_signals

if TYPE_CHECKING:  # importing it takes time, and requests to stop come first
    from megatron_hybrid.config.run import RunConfig


def main() -> int:
    """Run the command and return the exit status."""
    stop_signals.watch()  # before the imports that take time
    tolerate_output_errors()
    from megatron_hybrid.base.errors import REQUEUE, no_traceback
    from megatron_hybrid.base.heartbeat import heartbeat
    from megatron_hybrid.base.numbers import positive
    from megatron_hybrid.base.permanent_imports import permanent_imports
    from megatron_hybrid.config.command_line import RunCommandLine
    from megatron_hybrid.config.load import load_run
    from megatron_hybrid.config.run_dir import check_run_dir
    from megatron_hybrid.convert.architecture import architecture_of
    from megatron_hybrid.launch.environment import Launch

    parser = RunCommandLine(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run, look at its files, and stop")
    parser.add_argument("--world-size", type=positive, help="with --dry-run: number of ranks (default: the launcher's)")
    parser.add_argument(
        "--files",
        choices=("warn", "require", "skip"),
        default="warn",
        help="with --dry-run: files that are not on this machine are reported (the default), are errors, or are not looked for; "
        "files that are there and wrong are errors unless skipped",
    )
    arguments = parser.parse()
    with no_traceback():
        launch = Launch.from_environment().export()
        config = load_run(arguments.config, arguments.overrides, architecture_of)
        if arguments.dry_run:
            if launch.rank == 0:
                dry_run(config, arguments.world_size or launch.world_size, arguments.files)
            return 0
        config.check_world(launch.world_size)
        check_run_dir(config, launch.world_size)
        heartbeat.beat("importing torch")  # and megatron-core, only once the config is right
        with permanent_imports():
            from megatron_hybrid.distributed.deferred_compilation import defer_compilation

            defer_compilation()
            from megatron_hybrid.train.trainer import pretrain

        progress = pretrain(config, launch)
        return 0 if progress.step >= config.train.steps else REQUEUE


def dry_run(config: "RunConfig", world_size: int, files: str) -> None:
    """Print the resolved run; what is said of its files goes to stderr."""
    from megatron_hybrid.config.describe import describe
    from megatron_hybrid.train.dry_run import check_files
    from megatron_hybrid.train.dry_run_documents import look_at_documents

    text = describe(config, world_size, look_at_documents(config) if files != "skip" else None)
    for line in check_files(config, world_size, files == "require") if files != "skip" else ():
        print(f"{Path(sys.argv[0]).stem}: {line}", file=sys.stderr)
    print(text)
