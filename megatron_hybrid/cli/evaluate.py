"""Print loss, perplexity and bits per byte over data sets: `megatron-hybrid evaluate runs/tiny docs=data/docs code=data/code`.

Started by megatron-hybrid launch, torchrun, mpirun or srun, the ranks share the samples. The result does not depend on their number.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

from megatron_hybrid.base.errors import UserError, no_traceback
from megatron_hybrid.base.numbers import positive
from megatron_hybrid.base.permanent_imports import permanent_imports
from megatron_hybrid.config.command_line import CommandLine
from megatron_hybrid.config.command_options import add_checkpoint, add_plugins


def main() -> int:
    """Run the command and return the exit status."""
    parser = CommandLine(__doc__)
    add_checkpoint(parser, "checkpoint")
    parser.add_argument(
        "data", nargs="+", metavar="[NAME=]PREFIX", help="PREFIX of PREFIX.bin and .idx, or .npy shards"
    )
    parser.add_argument(
        "--dtype", choices=["uint16", "uint32"], help="type of tokens in .npy shards (default: from the vocabulary)"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="precision of the model (default: the run's)")
    parser.add_argument(
        "--check",
        choices=["auto", "full", "sample", "none"],
        default="auto",
        help="extent of the data check, as data.check",
    )
    parser.add_argument("--sequence-length", type=positive, help="tokens per sample (default: the run's)")
    parser.add_argument(
        "--documents",
        choices=["keep", "mask", "pack"],
        help="documents in a sample, as data.documents (default: the run's)",
    )
    parser.add_argument("--batch-size", type=positive, default=8, help="sequences per forward pass on a rank")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_plugins(parser)
    arguments = parser.parse()
    with no_traceback(), tempfile.TemporaryDirectory() as work:
        from megatron_hybrid.launch.environment import Launch

        rank = Launch.from_environment().export().rank
        with permanent_imports():
            from megatron_hybrid.distributed.deferred_compilation import defer_compilation

            defer_compilation()
            from megatron_hybrid.distributed.process_groups import stop_distributed
            from megatron_hybrid.evaluation.loaded_model import mean_loss, open_validation_sets, parse_sets
            from megatron_hybrid.evaluation.report import as_json, as_table
            from megatron_hybrid.inference.load import load_model

        paths = parse_sets(arguments.data)
        model = load_model(arguments.checkpoint, arguments.precision, plugins=arguments.plugin)
        sizes = (arguments.dtype, arguments.sequence_length, arguments.check, arguments.batch_size)
        sets = open_validation_sets(model, paths, *sizes, arguments.documents, work)
        results = {}
        for one in sets:
            report = partial(show_progress, one.name, one.num_samples) if rank == 0 else lambda samples: None
            results[one.name] = one.evaluate(partial(mean_loss, model), report)
            if not results[one.name].tokens:
                raise UserError(f"{one.name}: no tokens to evaluate")
        if rank == 0:
            print(json.dumps(as_json(results, model.step)) if arguments.json else as_table(results))
            for reason in {one.text_bytes.unknown_reason for one in sets} - {""}:
                print(f"{Path(sys.argv[0]).stem}: bits per byte are unknown: {reason}", file=sys.stderr)
        stop_distributed()
    return 0


def show_progress(name: str, total: int, samples: int) -> None:
    """Rewrite a line of the terminal with the number of samples."""
    if sys.stderr.isatty():
        print(f"\r{name}: {samples:,} of {total:,} samples", end="\n" if samples == total else "", file=sys.stderr)
