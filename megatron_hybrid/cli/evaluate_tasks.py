"""Run downstream tasks: `megatron-hybrid evaluate-tasks runs/tiny --tasks tasks/my_task tasks/other.yaml`.

A task is a YAML file in lm-eval's format, or a folder of them. With --lm-eval the harness runs it, and a task may also be the name of
one that it knows. Otherwise this package evaluates it, and nothing is downloaded. Under torchrun or mpirun, ranks share the documents.
"""

import json

from megatron_hybrid.base.errors import no_traceback
from megatron_hybrid.base.numbers import non_negative, positive
from megatron_hybrid.base.permanent_imports import permanent_imports
from megatron_hybrid.config.command_line import CommandLine
from megatron_hybrid.config.command_options import add_checkpoint, add_eos_token_id, add_plugins


def main() -> int:
    """Run the command and return the exit status."""
    parser = CommandLine(__doc__)
    add_checkpoint(parser, "model")
    parser.add_argument(
        "--tasks", required=True, nargs="+", metavar="TASK", help="task files, folders of them, or names"
    )
    parser.add_argument("--lm-eval", action="store_true", help="use the harness (package lm_eval)")
    parser.add_argument(
        "--num-fewshot", type=non_negative, help="with --lm-eval: number of examples (default: the task's)"
    )
    parser.add_argument("--limit", type=positive, help="documents per task (default: all)")
    parser.add_argument("--tokenizer", help="`byte` or a folder (default: the model's)")
    parser.add_argument("--max-length", type=positive, help="longest sequence (default: of the training sequences)")
    parser.add_argument("--batch-size", type=positive, default=8, help="sequences per forward pass")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="precision of the model")
    parser.add_argument("--tensor-parallel-size", type=positive, default=1, help="ranks that share a model")
    add_eos_token_id(parser)
    add_plugins(parser)
    arguments = parser.parse()
    with no_traceback():
        from megatron_hybrid.launch.environment import Launch

        rank = Launch.from_environment().export().rank
        with permanent_imports():
            from megatron_hybrid.distributed.deferred_compilation import defer_compilation

            defer_compilation()
            from megatron_hybrid.distributed.process_groups import stop_distributed
            from megatron_hybrid.evaluation.run_tasks import check_tasks, run_tasks
            from megatron_hybrid.evaluation.task_model import TaskModel
            from megatron_hybrid.inference.load import load_model

        check_tasks(arguments.tasks, arguments.lm_eval)
        size, end = arguments.tensor_parallel_size, arguments.eos_token_id
        loaded = load_model(arguments.model, arguments.dtype, arguments.plugin, size, end)
        model = TaskModel.of(loaded, arguments.tokenizer, arguments.max_length, arguments.batch_size)
        results = run_tasks(model, arguments.tasks, arguments.lm_eval, arguments.num_fewshot, arguments.limit)
        if rank == 0:
            print(json.dumps(results, indent=2, default=str))
        stop_distributed()
    return 0
