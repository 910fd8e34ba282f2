"""Check all tokens and indexes of a run before it takes GPUs: `megatron-hybrid check-data CONFIG.yaml [section.key=value ...]`.

With data.documents mask or pack, it also finds and packs the documents. Results are kept in the run's folder, where
megatron-hybrid pretrain finds them. To resume after an interruption, run the same command again.
"""

from rich.console import Console
from rich.progress import Progress

from megatron_hybrid.base.errors import no_traceback
from megatron_hybrid.config.command_line import RunCommandLine
from megatron_hybrid.config.load import load_run
from megatron_hybrid.convert.architecture import architecture_of
from megatron_hybrid.data.agreement import refuse, run_disagreements, warn
from megatron_hybrid.data.build import build_train_and_validation, open_sources
from megatron_hybrid.data.prepare_documents import DocumentPreparation, prepare_alone


def main() -> int:
    """Run the command and return the exit status."""
    parser = RunCommandLine(__doc__)
    parser.add_argument("--check", choices=["full", "sample"], default="full", help="how much is read")
    arguments = parser.parse()
    with no_traceback(), Progress(console=Console(stderr=True)) as bar:
        config = load_run(arguments.config, arguments.overrides, architecture_of)
        warn(refuse(run_disagreements(config.model, config.data)))
        task = bar.add_task("checking", total=None)
        data = config.data.model_copy(update={"check": arguments.check})
        vocab_size, documents = config.model.vocab_size, None
        if data.documents != "keep":
            sources = open_sources(data, vocab_size)
            documents = prepare_alone(DocumentPreparation(sources, data, config.model.eos_token_id, config.run_dir))
        train, validation = build_train_and_validation(
            data,
            vocab_size,
            config.run_dir,
            report=lambda done, total: bar.update(task, completed=done, total=total),
            documents=documents,
        )
    datasets = [dataset for blend in (train, *validation.values()) for dataset in blend.datasets]
    sizes = {dataset.source.name: dataset.source.num_tokens for dataset in datasets}
    for name, tokens in sizes.items():
        print(f"{name}: {tokens:,} tokens")
    if documents is not None:
        print(*documents.describe(), sep="\n")
    return 0
