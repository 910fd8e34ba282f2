"""Print mean loss and perplexity over a data set: `python tools/evaluate.py runs/tiny data/tiny_validation`."""

import json
import math
import sys

from megatron_hybrid.base.errors import UserError, no_traceback
from megatron_hybrid.base.numbers import positive
from megatron_hybrid.config.command_line import CommandLine


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest)")
    parser.add_argument("data", metavar="DATA_PREFIX", help="PREFIX of PREFIX.bin and .idx, or .npy shards")
    parser.add_argument("--dtype", choices=["uint16", "uint32"], help="of .npy shards (default: from the vocabulary)")
    parser.add_argument(
        "--check", choices=["auto", "full", "sample", "none"], default="auto", help="as data.check of a run"
    )
    parser.add_argument("--sequence-length", type=positive, help="tokens per sample (default: the run's)")
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE", help="a module of the run's plugins; may be repeated"
    )
    arguments = parser.parse()
    with no_traceback():
        from megatron_hybrid.distributed.process_groups import stop_distributed
        from megatron_hybrid.evaluation.mean_loss import mean_loss, open_evaluation_data
        from megatron_hybrid.inference.load import load_model

        model = load_model(arguments.checkpoint, plugins=arguments.plugin)
        dataset = open_evaluation_data(
            model, arguments.data, arguments.dtype, arguments.sequence_length, arguments.check
        )
        tokens, loss = 0, float("nan")
        for tokens, loss in mean_loss(model, dataset, arguments.batch_size):  # noqa: B007 - the last pair is the result
            if sys.stderr.isatty():
                total = dataset.samples_per_epoch * dataset.sequence_length
                print(f"\r{tokens:,} of {total:,} tokens", end="", file=sys.stderr)
        if not tokens:
            raise UserError(f"{arguments.data}: no tokens to evaluate")
        perplexity = math.exp(loss) if loss < 700 else None  # larger than a double
        result = {"loss": loss, "perplexity": perplexity, "tokens": tokens, "step": model.step}
        shown = "over 1e304" if perplexity is None else f"{perplexity:.4f}"
        text = f"loss {loss:.5f} nats per token, perplexity {shown}, over {tokens:,} tokens"
        print(json.dumps(result) if arguments.json else text)
        stop_distributed()


if __name__ == "__main__":
    sys.exit(main())
