"""Continue a prompt: `python tools/generate.py runs/tiny --prompt 'def main():'`."""

import sys

from megatron_hybrid.config.command_line import CommandLine
from megatron_hybrid.config.errors import no_traceback


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint's folder, or a run's (its newest)")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokenizer", help="`byte` or a folder (default: the run's)")
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="0: no limit")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse()
    with no_traceback():
        from megatron_hybrid.data.tokenizer import load_tokenizer
        from megatron_hybrid.parallel.launch import stop_distributed
        from megatron_hybrid.train.inference import generate, load_model

        model = load_model(arguments.checkpoint)
        tokenizer = load_tokenizer(arguments.tokenizer or model.run.get("data", {}).get("tokenizer", "byte"))
        prompt = tokenizer.encode(arguments.prompt)
        written, tokens = arguments.prompt, list(prompt)
        print(written, end="", flush=True)
        for token in generate(
            model, prompt, arguments.max_tokens, arguments.temperature, arguments.top_k, arguments.seed
        ):
            tokens.append(token)
            text = tokenizer.decode(tokens)  # whole, so that a character of several tokens comes out right
            if not text.endswith("\ufffd"):
                print(text[len(written) :], end="", flush=True)
                written = text
        print()
        stop_distributed()


if __name__ == "__main__":
    sys.exit(main())
