"""Datasets of a run by its configuration."""

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_hybrid.config.data import DataConfig, MixChangeConfig, SourceConfig
from megatron_hybrid.data.blend import Blend, Dataset
from megatron_hybrid.data.curriculum import Curriculum
from megatron_hybrid.data.dataset import FixedLengthDataset
from megatron_hybrid.data.document_dataset import DocumentDataset
from megatron_hybrid.data.generated import generated_datasets
from megatron_hybrid.data.permutation import hash_integers
from megatron_hybrid.data.prepare_documents import DocumentPreparation
from megatron_hybrid.data.sample_readers import StreamReader
from megatron_hybrid.data.sources import TokenSource, open_source
from megatron_hybrid.data.validate import Team, check_sources, choose_mode
from megatron_hybrid.data.verdicts import VerdictCache


def open_sources(config: DataConfig, vocab_size: int) -> dict[SourceConfig, TokenSource]:
    """Open the files of all blends, each once. Weights do not matter to what is opened: the keys have weight 1.

    Raises:
        DataError: naming the file that is wrong.
    """
    keys = dict.fromkeys(_without_weight(source) for source in config.files().values())
    return {key: open_source(key, vocab_size) for key in keys}


def build_train_and_validation(
    config: DataConfig,
    vocab_size: int,
    cache: VerdictCache | str | Path | None = None,
    validate: bool = True,
    team: Team | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
    documents: DocumentPreparation | None = None,
    curriculum: Curriculum | None = None,
) -> tuple[Blend, dict[str, Blend]]:
    """Return the blend that training reads, and the blend of each validation set by its name.

    Every process of a run builds them. With a team, each process checks a share of the files, and the blends may be used
    when all of them have returned.

    Args:
        vocab_size: of the model without padding; tokens must be below it.
        cache: verdicts on files, or the folder that they are kept in, such as the run's; None: nowhere.
        validate: check indexes and tokens as `data.check` says, beyond what opening the files checks.
        team, report: as `check_sources` takes them.
        documents: of the same configuration, opened; needed unless `data.documents` is keep.
        curriculum: sizes of the samples that training generates; None: each generator's own.

    Raises:
        DataError: naming the file and the offset of what is wrong.
        ValueError: documents are needed and not given.
    """
    if documents is None and config.documents != "keep":
        raise ValueError(f"documents: needed with data.documents = {config.documents}")
    opened = documents.opened if documents else open_sources(config, vocab_size)

    def dataset(source: TokenSource, seed: int) -> Dataset:
        if documents is not None:
            return DocumentDataset(documents.reader(source), seed, config.instance_filter)
        if config.instance_filter is not None:
            return DocumentDataset(StreamReader(source, config.sequence_length), seed, config.instance_filter)
        return FixedLengthDataset(source, config.sequence_length, seed)

    def blend(configs: Sequence[SourceConfig], purpose: int, changes: Sequence[MixChangeConfig] = ()) -> Blend:
        seeds = [hash_integers(config.seed, purpose, i) for i in range(len(configs))]
        generators = [source_config.generator for source_config in configs if source_config.generator is not None]
        datasets: list[Dataset] = []
        if generators:
            datasets += generated_datasets(generators, seeds, None if purpose else curriculum)
        else:
            sources = [opened[_without_weight(source_config)] for source_config in configs]
            datasets += [dataset(source, seed) for source, seed in zip(sources, seeds, strict=True)]
        length = datasets[0].sequence_length  # shorter than data.sequence_length where samples are generated
        mixes = [(-(-change.after_tokens // length), change.weights) for change in changes]
        return Blend(datasets, [source_config.weight for source_config in configs], mixes)

    train = blend(config.train, 0, config.mix_changes)
    validation = {name: blend(configs, 1) for name, configs in config.validation.items()}
    sources = list(opened.values())
    mode = choose_mode(config.check, sources) if validate and sources else None
    if mode is not None:
        verdicts = cache if isinstance(cache, VerdictCache) else VerdictCache(cache)
        check_sources(sources, vocab_size, mode, verdicts, team, report)
    return train, validation


def _without_weight(source: SourceConfig) -> SourceConfig:
    return source.model_copy(update={"weight": 1.0})
