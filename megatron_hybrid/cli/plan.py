"""Choose parallel degrees: rank every layout of a training job by predicted step time, and predict its memory.

megatron-hybrid plan --model olmo_hybrid_7b --gpus 64 --gpu h100-80gb --sequence-length 8192 --global-batch-size 512

Exit codes: 0 done, 78 wrong arguments.
"""

import signal
from pathlib import Path

from megatron_hybrid.arch.fp8_recipes import FP8_RECIPES
from megatron_hybrid.base.errors import no_traceback
from megatron_hybrid.base.numbers import non_negative, positive
from megatron_hybrid.config.command_line import CommandLine
from megatron_hybrid.planner.command import Request, answer


def main() -> int:
    """Run the command and return the exit status."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a preset, a YAML file with a model's fields, or a run's YAML file")
    add("--gpus", type=positive, required=True, help="number of GPUs")
    add("--gpu", default="h100-80gb", help="name of a hardware file in megatron_hybrid/planner/gpus")
    add("--hardware", metavar="FILE", help="a hardware file of your own, from megatron-hybrid calibrate (default: --gpu)")
    add("--gpus-per-node", type=positive, help="GPUs of a node (default: the hardware file's)")
    add("--sequence-length", type=positive, help="tokens per sequence (default: the run's)")
    add("--global-batch-size", type=positive, help="sequences per step (default: the run's)")
    add(
        "--documents",
        choices=("keep", "mask", "pack"),
        help="as data.documents (default: the run's, or keep)",
    )
    add("--document-length", type=positive, help="mean tokens of a document (default: 1,000), for mask and pack")
    formats = ("bf16", "fp8", *(f"fp8_{name}" for name in FP8_RECIPES))
    add("--precision", choices=formats, help="format of the GEMMs (default: the run's, or bf16)")
    add(
        "--recompute",
        choices=("auto", "none", "selective", "full"),
        default="auto",
        help="auto: compare none, selective and full",
    )
    add("--top", type=positive, default=10, help="lines of the table")
    add("--json", action="store_true", help="the table, with every part, as JSON")
    add(
        "--why",
        action="append",
        default=[],
        metavar="tp=4,...",
        help="say why such layouts are not best; may be repeated",
    )
    add("--emit", type=Path, metavar="RUN.yaml", help="write the best layout as a run's configuration (default: not written)")
    add("--plot", type=Path, metavar="PNG", help="draw memory and step time of the best layouts (default: not drawn)")
    add(
        "--measure",
        type=non_negative,
        default=0,
        metavar="N",
        help="run the best N for 10 steps on this machine, and rank again; 0: measure nothing",
    )
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="read factors from it; with --measure, keep the measurements in it (default: none)",
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also stops what --measure started
    with no_traceback():
        print(answer(Request(**vars(parser.parse()))))
    return 0
