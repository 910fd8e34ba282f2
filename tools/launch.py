"""Start a command on this node's ranks, one a GPU: `[srun --ntasks-per-node=1] python tools/launch.py tools/pretrain.py ...`.

Ends with the status of the first rank that fails (75: requeue; 78: wrong configuration), and passes SIGUSR1 and SIGTERM
on to the ranks, which then save and stop.
"""

import argparse
import os
import sys

from megatron_hybrid.config.errors import no_traceback
from megatron_hybrid.parallel.node import run_node


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-ranks", type=int, metavar="N", help="N ranks on CPU, whatever GPUs there are")
    parser.add_argument("--gpus", type=int, metavar="N", help="this node must have N (default: as many as are visible)")
    parser.add_argument("script", help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    arguments = parser.parse_args()
    if arguments.cpu_ranks:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with no_traceback():
        command = [sys.executable, arguments.script, *arguments.arguments]
        sys.exit(run_node(command, arguments.cpu_ranks, arguments.gpus))


if __name__ == "__main__":
    main()
