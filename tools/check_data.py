"""Check all tokens and indexes of a run before it takes GPUs: `python tools/check_data.py CONFIG.yaml [section.key=value ...]`.

Verdicts are kept in the run's folder, where tools/pretrain.py finds them; to resume after an interruption, run the same
command again.
"""

import argparse
import sys

from rich.console import Console
from rich.progress import Progress

from megatron_hybrid.base.errors import no_traceback
from megatron_hybrid.config.load import load_run
from megatron_hybrid.convert.architecture import architecture_of
from megatron_hybrid.data.agreement import refuse, run_disagreements, warn
from megatron_hybrid.data.build import build_train_and_validation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the file")
    parser.add_argument("--check", choices=["full", "sample"], default="full", help="how much is read (default: full)")
    arguments = parser.parse_args()
    with no_traceback(), Progress(console=Console(stderr=True)) as bar:
        config = load_run(arguments.config, arguments.overrides, architecture_of)
        warn(refuse(run_disagreements(config.model, config.data)))
        task = bar.add_task("checking", total=None)
        data = config.data.model_copy(update={"check": arguments.check})
        train, validation = build_train_and_validation(
            data,
            config.model.vocab_size,
            config.run_dir,
            report=lambda done, total: bar.update(task, completed=done, total=total),
        )
    datasets = [dataset for blend in (train, *validation.values()) for dataset in blend.datasets]
    sources = {dataset.source.name: dataset.source.num_tokens for dataset in datasets}
    for name, tokens in sources.items():
        print(f"{name}: {tokens:,} tokens")


if __name__ == "__main__":
    sys.exit(main())
