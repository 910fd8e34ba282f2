"""Train a model: `torchrun --nproc-per-node 4 tools/pretrain.py CONFIG.yaml [section.key=value ...]`.

Exit codes: 0 done, 78 wrong configuration, data or checkpoint.
"""

import argparse
import os

from megatron_hybrid.config.describe import describe
from megatron_hybrid.config.errors import no_traceback
from megatron_hybrid.config.load import load_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the file")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and stop")
    parser.add_argument("--world-size", type=int, help="with --dry-run: the number of ranks (default: the launcher's)")
    arguments = parser.parse_args()
    world_size = arguments.world_size or int(os.environ.get("WORLD_SIZE", 1))
    with no_traceback():
        config = load_run(arguments.config, arguments.overrides)
        if arguments.dry_run:
            print(describe(config, world_size))
            return
        config.check_world(world_size)
        from megatron_hybrid.parallel.launch import Launch  # torch and megatron-core only once the config is right
        from megatron_hybrid.train.trainer import pretrain

        pretrain(config, Launch.from_environment())


if __name__ == "__main__":
    main()
