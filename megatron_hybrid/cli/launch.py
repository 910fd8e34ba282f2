"""Start a command on this node's ranks, one per GPU: `megatron-hybrid launch [options] pretrain CONFIG.yaml ...`.

The command is one of `megatron-hybrid`, or a Python file. On several nodes, start the launcher once on each: by
`srun --ntasks-per-node=1` or mpirun, or by a job controller that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (or NODE_RANK
and NNODES) for each node. It ends with the status of the first rank that fails (75: requeue; 78: wrong input), and forwards
SIGUSR1, SIGTERM and Ctrl-C to the ranks, which then save and stop. Further signals change nothing. With --max-restarts, it starts
the ranks of a single node again after a failure or a hang.
"""

import argparse
import os
import sys

from megatron_hybrid.base.command import process_arguments
from megatron_hybrid.base.errors import no_traceback
from megatron_hybrid.base.numbers import positive
from megatron_hybrid.cli.table import COMMANDS
from megatron_hybrid.config.command_line import CommandLine
from megatron_hybrid.launch.node import run_node


def main() -> int:
    """Run the command and return the exit status."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--cpu-ranks", type=positive, metavar="N", help="start N ranks on CPU (default: ranks on GPUs)")
    add("--gpus", type=positive, metavar="N", help="this node must have N (default: as many as are visible)")
    add(
        "--max-restarts",
        type=positive,
        default=0,
        metavar="N",
        help="start the ranks again up to N times after a failure or a hang, while they make progress (default: 0)",
    )
    add("command", help="a command, such as pretrain, or a Python file")
    add("arguments", nargs=argparse.REMAINDER, help="the command's own arguments")
    arguments = parser.parse_args()
    words = [arguments.command, *arguments.arguments]
    if words[0] in {name.partition(" ")[0] for name in COMMANDS}:
        command = process_arguments(words)
    elif os.path.isfile(words[0]):
        command = [sys.executable, *words]
    else:
        parser.error(f"{words[0]}: no such file; give a command or a Python file that the ranks run, after the options")
    if arguments.cpu_ranks:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with no_traceback():
        return run_node(command, arguments.cpu_ranks, arguments.gpus, arguments.max_restarts)
