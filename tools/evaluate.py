"""Mean loss and perplexity over a dataset: `python tools/evaluate.py runs/tiny data/tiny_validation`."""

import json
import math
import sys

from megatron_hybrid.config.command_line import CommandLine
from megatron_hybrid.config.errors import UserError, no_traceback


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest)")
    parser.add_argument("data", metavar="DATA_PREFIX", help="PREFIX of PREFIX.bin and .idx, or .npy shards")
    parser.add_argument("--sequence-length", type=int, help="tokens a sample has (default: the run's)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse()
    with no_traceback():
        from megatron_hybrid.config.data import SourceConfig
        from megatron_hybrid.data.dataset import FixedLengthDataset
        from megatron_hybrid.data.sources import open_source
        from megatron_hybrid.parallel.launch import stop_distributed
        from megatron_hybrid.train.inference import load_model, mean_loss

        model = load_model(arguments.checkpoint)
        length = arguments.sequence_length or model.run.get("data", {}).get("sequence_length")
        if not length:
            raise UserError("--sequence-length is missing: the checkpoint does not name one")
        source = open_source(SourceConfig(path=arguments.data), model.config.vocab_size)
        dataset = FixedLengthDataset(source, length, seed=0, shuffle=False)
        tokens, loss = 0, float("nan")
        for tokens, loss in mean_loss(model, dataset, arguments.batch_size):  # noqa: B007 - the last pair is the result
            if sys.stderr.isatty():
                print(f"\r{tokens:,} of {dataset.samples_per_epoch * length:,} tokens", end="", file=sys.stderr)
        result = {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens, "step": model.step}
        text = "loss {loss:.5f} nats a token, perplexity {perplexity:.4f}, over {tokens:,} tokens".format(**result)
        print(json.dumps(result) if arguments.json else text)
        stop_distributed()


if __name__ == "__main__":
    sys.exit(main())
