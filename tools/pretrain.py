"""Train a model: `torchrun --nproc-per-node 4 tools/pretrain.py CONFIG.yaml [section.key=value ...]`.

The ranks may as well be started by tools/launch.py, `mpirun -n 4 python`, `srun python` or `srun --mpi=pmix python`.
On SIGUSR1 or SIGTERM every rank saves the same step and stops; the same command goes on from there.
Exit codes: 0 done, 75 stopped by a signal with its work saved, 78 wrong configuration, data, checkpoint or node. torchrun
makes 1 of every status but 0, and gives ranks 30 seconds after SIGTERM; tools/launch.py keeps both as they are.
"""

import argparse
import sys

from megatron_hybrid.config.describe import describe
from megatron_hybrid.config.errors import REQUEUE, no_traceback
from megatron_hybrid.config.load import load_run
from megatron_hybrid.parallel.environment import Launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the file")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and stop")
    parser.add_argument("--world-size", type=int, help="with --dry-run: the number of ranks (default: the launcher's)")
    arguments = parser.parse_args()
    with no_traceback():
        launch = Launch.from_environment().export()
        config = load_run(arguments.config, arguments.overrides)
        if arguments.dry_run:
            text = describe(config, arguments.world_size or launch.world_size)
            if launch.rank == 0:
                print(text)
            return
        config.check_world(launch.world_size)
        from megatron_hybrid.train.trainer import pretrain  # torch and megatron-core only once the config is right

        progress = pretrain(config, launch)
        sys.exit(0 if progress.step >= config.train.steps else REQUEUE)


if __name__ == "__main__":
    main()
