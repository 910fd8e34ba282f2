"""Convert an OLMo-core checkpoint (`stepN`, or its `model_and_optim`) to a checkpoint that training loads under any layout.

megatron-hybrid convert from-olmo-core runs/hybrid/step1000 checkpoints/hybrid-1000
megatron-hybrid convert from-olmo-core runs/hybrid/step1000 checkpoints/hybrid-1000 --dtype bf16 --no-optimizer

AdamW's moments and its count of updates are converted, too. OLMo-core need not be installed; no code in the files is run.
Exit codes: 0 done; 78 wrong input, or a file could not be read or written; 130 interrupted. Afterwards, the same command resumes.
"""

import argparse
from pathlib import Path

from megatron_hybrid.base.numbers import non_negative
from megatron_hybrid.config.command_line import CommandLine
from megatron_hybrid.convert.command import DTYPES, convert
from megatron_hybrid.convert.olmo_core.importer import from_olmo_core


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="CKPT", help="folder with config.json and model_and_optim")
    add("target", type=Path, metavar="OUT_CKPT", help="folder to create; it must not exist yet")
    add("--dtype", choices=DTYPES, help="type of the weights (default: as they are); A_log and dt_bias are always fp32")
    add("--no-optimizer", action="store_true", help="convert only the weights")
    add("--config", type=Path, metavar="FILE", help="the run's config.json (default: the folder's)")
    add(
        "--eos-token-id",
        type=non_negative,
        metavar="N",
        help="end of a document (default: config.json's dataset.tokenizer)",
    )
    add("--pad-token-id", type=non_negative, metavar="N", help="padding (default: config.json's dataset.tokenizer)")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit status."""
    a = parse_arguments(argv)
    options = (DTYPES.get(a.dtype), not a.no_optimizer, a.eos_token_id, a.pad_token_id, a.config)
    return convert(lambda: from_olmo_core(a.source, a.target, *options), a.target, a.quiet)
