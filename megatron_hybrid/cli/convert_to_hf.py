"""Convert a checkpoint to a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads.

megatron-hybrid convert to-hf run/checkpoints/step-00010000 exported --dtype bf16 --tokenizer tokenizers/olmo
mpirun -n 4 megatron-hybrid convert to-hf run/checkpoints/step-00010000 exported

Exit codes: 0 done; 78 wrong input, or a file could not be read or written; 130 interrupted. Afterwards, the same command resumes.
"""

import argparse
from pathlib import Path

from megatron_hybrid.base.numbers import positive
from megatron_hybrid.config.command_line import CommandLine
from megatron_hybrid.convert.command import DTYPES, convert, size
from megatron_hybrid.convert.hf.exporter import MAX_SHARD_BYTES, to_huggingface


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add(
        "source",
        type=Path,
        metavar="CKPT",
        help="a run (its newest checkpoint) or a checkpoint, such as run/checkpoints/step-00010000",
    )
    add("target", type=Path, metavar="OUT_DIR", help="folder to create; it must not exist yet")
    add(
        "--dtype",
        choices=DTYPES,
        help="type of the weights (default: as they are; fp32: a bf16 run's masters); A_log and dt_bias keep fp32, by default those "
        "of a converted model that was not trained the original's type",
    )
    add("--all-dtype", action="store_true", help="A_log and dt_bias in --dtype (or their stored type) too")
    add("--max-shard-size", type=size, default=MAX_SHARD_BYTES, metavar="SIZE", help="largest file (default: 5GB)")
    add("--tokenizer", type=Path, metavar="DIR", help="tokenizer to copy (default: the original model's)")
    add(
        "--max-position-embeddings",
        type=positive,
        metavar="N",
        help="longest sequence that config.json states (default: the longest known)",
    )
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit status."""
    a = parse_arguments(argv)
    options = (DTYPES.get(a.dtype), a.all_dtype, a.max_shard_size, a.tokenizer, a.max_position_embeddings)
    return convert(lambda: to_huggingface(a.source, a.target, *options), a.target, a.quiet)
