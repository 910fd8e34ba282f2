"""Tokenize text files, JSON lines, Parquet or a folder of source code for training.

megatron-hybrid preprocess corpus.jsonl.zst --output data/corpus --tokenizer tokenizers/olmo --workers 8
megatron-hybrid preprocess /usr/lib/python3.12 --include '*.py' --output data/python --split 0.99,0.01
"""

import argparse
import os
import signal
import sys
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_hybrid.base.errors import BAD_INPUT
from megatron_hybrid.base.numbers import positive
from megatron_hybrid.config.command_line import CommandLine
from megatron_hybrid.data.preprocess import describe_skipped, parse_split, preprocess
from megatron_hybrid.data.records import ReadOptions


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLine(__doc__)
    add, add_patterns = (
        parser.add_argument,
        partial(parser.add_argument, nargs="+", action="extend", default=[], metavar="PATTERN"),
    )
    add("inputs", nargs="+", help="text, JSON lines (also .gz .zst .bz2 .xz), Parquet, or folders")
    add("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx and PREFIX.json")
    add("--tokenizer", default="byte", help="`byte`, or the folder of a Hugging Face tokenizer (default: byte)")
    add("--json-key", default="text", help="member or column that holds the document (default: text)")
    add_patterns("--include", help="files of a folder to take, such as '*.py' '*.rs' (default: all)")
    add_patterns("--exclude", help="files of a folder to leave out, such as 'test/*' (default: none)")
    add(
        "--format",
        choices=["auto", "text", "jsonl"],
        default="auto",
        help="format of the inputs; auto: by content and name (default: auto)",
    )
    add(
        "--bad-records",
        choices=["error", "skip"],
        default="error",
        help="skip: leave bad records out and count them (default: error)",
    )
    add("--bad-utf8", choices=["error", "skip", "replace"], help="text that is not UTF-8 (default: as --bad-records)")
    add(
        "--split",
        metavar="SHARES",
        help="such as 0.99,0.01: write PREFIX_train and PREFIX_validation (default: one dataset)",
    )
    add("--split-names", default="train,validation", metavar="NAMES", help="one per share (default: train,validation)")
    add("--no-eos", action="store_true", help="do not end documents with the end-of-document token")
    add(
        "--workers",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        help="processes (default: the cores there are)",
    )
    add("--sha256", action="store_true", help="put a hash of the tokens into PREFIX.json")
    add("--overwrite", action="store_true", help="replace an existing dataset of this tool")
    return parser.parse(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit status."""
    arguments = parse_arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SLURM's, too, leaves the old dataset in place
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=None)
            summaries = preprocess(
                *(arguments.inputs, arguments.output),
                tokenizer=arguments.tokenizer,
                options=ReadOptions(arguments.json_key, arguments.bad_utf8, arguments.bad_records),
                include=arguments.include,
                exclude=arguments.exclude,
                kind=arguments.format,
                split=parse_split(arguments.split, arguments.split_names),
                append_eos=not arguments.no_eos,
                workers=arguments.workers,
                sha256=arguments.sha256,
                overwrite=arguments.overwrite,
                progress=lambda consumed, total: bar.update(task, completed=consumed, total=total),
                say=bar.console.print,
            )
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted: nothing written", file=sys.stderr)
        return 130
    for prefix, summary in summaries.items():
        print(f"{prefix}: {summary.documents} documents, {summary.tokens} tokens ({summary.dtype})")
    print(describe_skipped(summary), end="")
    return 0
