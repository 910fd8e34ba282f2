"""Write tasks for megatron-hybrid evaluate-tasks: `megatron-hybrid make-tasks long-context tasks/long --tokenizer tokenizers/olmo`.

stdlib: three small tasks from data that ships with Python. long-context: needle, variables and common_words in the style of RULER.
"""

from pathlib import Path

from megatron_hybrid.base.errors import no_traceback
from megatron_hybrid.base.numbers import non_negative, positive
from megatron_hybrid.config.command_line import CommandLine

LENGTHS = [4096, 8192, 16384, 32768, 65536]


def main() -> int:
    """Run the command and return the exit status."""
    parser = CommandLine(__doc__)
    parser.add_argument("kind", choices=["stdlib", "long-context"], help="kind of tasks")
    parser.add_argument("folder", type=Path, help="folder to create")
    parser.add_argument("--seed", type=non_negative, default=0, help="seed of the documents")
    parser.add_argument("--tokenizer", default="byte", help="long-context: `byte` or a folder, to count tokens")
    parser.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        default=LENGTHS,
        help="long-context: tokens of a document, answer included (default: 4096 to 65536 by factors of 2)",
    )
    parser.add_argument("--documents", type=positive, default=100, help="long-context: documents per task and length")
    arguments = parser.parse()
    with no_traceback():
        from megatron_hybrid.data.tokenizer import load_tokenizer
        from megatron_hybrid.evaluation.long_context import write_long_context_tasks
        from megatron_hybrid.evaluation.stdlib_tasks import write_stdlib_tasks

        if arguments.kind == "stdlib":
            write_stdlib_tasks(arguments.folder, arguments.seed)
        else:
            tokenizer = load_tokenizer(arguments.tokenizer)
            options = (arguments.lengths, arguments.documents, arguments.seed)
            write_long_context_tasks(arguments.folder, tokenizer, *options)
    return 0
