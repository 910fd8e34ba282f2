"""Continue a prompt: `python tools/generate.py runs/tiny --prompt 'def main():'`."""

import io
import sys

from megatron_hybrid.base.errors import no_traceback
from megatron_hybrid.base.numbers import non_negative, non_negative_real, positive
from megatron_hybrid.config.command_line import CommandLine


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest)")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokenizer", help="`byte` or a folder (default: the run's)")
    parser.add_argument("--max-tokens", type=positive, default=300)
    parser.add_argument("--temperature", type=non_negative_real, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=non_negative, default=50, help="0: no limit")
    parser.add_argument("--seed", type=non_negative, default=0)
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE", help="a module of the run's plugins; may be repeated"
    )
    arguments = parser.parse()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8
    with no_traceback():
        from megatron_hybrid.data.streaming import ContinuationText
        from megatron_hybrid.distributed.process_groups import stop_distributed
        from megatron_hybrid.inference.generate import check_generation, generate, tokenize_prompt
        from megatron_hybrid.inference.load import load_model

        model = load_model(arguments.checkpoint, plugins=arguments.plugin)
        tokenizer, prompt = tokenize_prompt(model, arguments.prompt, arguments.tokenizer)
        how = (prompt, arguments.max_tokens, arguments.temperature, arguments.top_k, arguments.seed)
        check_generation(model.config.vocab_size, *how)
        text = ContinuationText(tokenizer, prompt)
        print(arguments.prompt, end="", flush=True)
        for token in generate(model, *how):
            print(text.add(token), end="", flush=True)
        print(text.end())
        stop_distributed()


if __name__ == "__main__":
    sys.exit(main())
