"""Start a command on this node's ranks, one a GPU: `[srun --ntasks-per-node=1] python tools/launch.py tools/pretrain.py ...`.

On several nodes it is started once on each: by srun or mpirun, or by a job controller that sets RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT (or NODE_RANK and NNODES) for each node. It ends with the status of the first rank that fails
(75: requeue; 78: wrong input), and forwards SIGUSR1, SIGTERM and Ctrl-C to the ranks, which then save and stop. Further
signals change nothing. With --max-restarts, it starts the ranks of a single node again after a failure or a hang.
"""

import signal

if __name__ == "__main__":  # keep requests to stop pending until they are handled
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])

# ruff: noqa: E402
import argparse
import os
import sys

from megatron_hybrid.base.errors import no_traceback
from megatron_hybrid.base.numbers import positive
from megatron_hybrid.config.command_line import CommandLine
from megatron_hybrid.launch.node import run_node


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--cpu-ranks", type=positive, metavar="N", help="N ranks on CPU, whatever GPUs there are")
    parser.add_argument(
        "--gpus", type=positive, metavar="N", help="this node must have N (default: as many as are visible)"
    )
    parser.add_argument(
        "--max-restarts",
        type=positive,
        default=0,
        metavar="N",
        help="start the ranks again up to N times after a failure or a hang, while they make progress (default: 0)",
    )
    parser.add_argument("script", help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    arguments = parser.parse_args()
    if not os.path.isfile(arguments.script):
        parser.error(f"{arguments.script}: no such file; give the Python file that the ranks run, after the options")
    if arguments.cpu_ranks:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with no_traceback():
        command = [sys.executable, arguments.script, *arguments.arguments]
        sys.exit(run_node(command, arguments.cpu_ranks, arguments.gpus, arguments.max_restarts))


if __name__ == "__main__":
    main()
