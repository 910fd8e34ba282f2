"""Continue prompts: `megatron-hybrid generate runs/tiny --prompt 'def main():'`.

With several prompts, all are continued as one batch and printed in order at the end. Under torchrun or mpirun, the ranks share the
model (tensor parallelism).
"""

import io
import os
import sys

from megatron_hybrid.base.errors import no_traceback
from megatron_hybrid.base.numbers import non_negative, non_negative_real, positive
from megatron_hybrid.base.permanent_imports import permanent_imports
from megatron_hybrid.config.command_line import CommandLine
from megatron_hybrid.config.command_options import add_checkpoint, add_eos_token_id, add_plugins


def main() -> int:
    """Run the command and return the exit status."""
    parser = CommandLine(__doc__)
    add_checkpoint(parser, "model")
    parser.add_argument("--prompt", required=True, action="append", help="text to continue; may be repeated")
    parser.add_argument("--tokenizer", help="`byte` or a folder (default: the model's)")
    parser.add_argument("--max-tokens", type=positive, default=300, help="longest continuation")
    parser.add_argument(
        "--temperature",
        type=non_negative_real,
        default=0.8,
        help="0: always the most likely token",
    )
    parser.add_argument(
        "--top-k", type=non_negative, default=50, help="sample from the K most likely tokens; 0: no limit"
    )
    parser.add_argument(
        "--top-p",
        type=non_negative_real,
        default=1.0,
        help="sample from tokens of this total probability; 1: no limit",
    )
    parser.add_argument("--seed", type=non_negative, default=0, help="seed of the sampling")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="precision of the model")
    add_eos_token_id(parser)
    parser.add_argument("--cuda-graph", action="store_true", help="replay decoding steps as a CUDA graph")
    add_plugins(parser)
    arguments = parser.parse()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8
    with no_traceback():
        from megatron_hybrid.launch.environment import Launch

        launch = Launch.from_environment().export()
        if launch.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        with permanent_imports():
            from megatron_hybrid.distributed.deferred_compilation import defer_compilation

            defer_compilation()
            from megatron_hybrid.distributed.process_groups import stop_distributed
            from megatron_hybrid.inference.load import load_model
            from megatron_hybrid.inference.prompt_text import print_continuations
            from megatron_hybrid.inference.sampling import Sampling

        sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed).check()
        model = load_model(
            arguments.model, arguments.dtype, arguments.plugin, launch.world_size, arguments.eos_token_id
        )
        options = (arguments.tokenizer, arguments.max_tokens, sampling, arguments.cuda_graph)
        print_continuations(model, arguments.prompt, *options)
        stop_distributed()
    return 0
