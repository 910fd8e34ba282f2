"""Convert a Hugging Face folder (safetensors) to a checkpoint that training loads under any layout.

Architectures: `olmo_hybrid`, `olmo3`, `qwen3_5`, `qwen3_5_text` and `mainline_ladder`.

megatron-hybrid convert from-hf Olmo-Hybrid-7B checkpoints/olmo-hybrid-7b
mpirun -n 4 megatron-hybrid convert from-hf Olmo-Hybrid-7B checkpoints/olmo-hybrid-7b --dtype bf16
megatron-hybrid pretrain config.yaml checkpoint.init_from=checkpoints/olmo-hybrid-7b

Exit codes: 0 done; 78 wrong input, or a file could not be read or written; 130 interrupted. Afterwards, the same command resumes.
"""

import argparse
from pathlib import Path

from megatron_hybrid.base.numbers import non_negative
from megatron_hybrid.config.command_line import CommandLine
from megatron_hybrid.convert.command import DTYPES, convert
from megatron_hybrid.convert.hf.importer import from_huggingface


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="HF_DIR", help="folder with config.json and safetensors")
    add("target", type=Path, metavar="OUT_CKPT", help="folder to create; it must not exist yet")
    add("--dtype", choices=DTYPES, help="type of the weights (default: as they are); A_log and dt_bias are always fp32")
    add(
        "--eos-token-id",
        type=non_negative,
        metavar="N",
        help="token that ends a document (default: config.json's); needed if config.json lists several",
    )
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit status."""
    a = parse_arguments(argv)
    return convert(lambda: from_huggingface(a.source, a.target, DTYPES.get(a.dtype), a.eos_token_id), a.target, a.quiet)
