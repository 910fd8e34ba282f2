"""Datasets of a run by its configuration."""

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_hybrid.config.data import DataConfig, SourceConfig
from megatron_hybrid.data.blend import Blend
from megatron_hybrid.data.dataset import FixedLengthDataset
from megatron_hybrid.data.permutation import hash_integers
from megatron_hybrid.data.sources import TokenSource, open_source
from megatron_hybrid.data.validate import Team, check_sources, choose_mode
from megatron_hybrid.data.verdicts import VerdictCache


def build_train_and_validation(
    config: DataConfig,
    vocab_size: int,
    cache: VerdictCache | str | Path | None = None,
    validate: bool = True,
    team: Team | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Blend, Blend | None]:
    """Return the blends that training and evaluation read; validation is None if none is configured.

    Every process of a run builds them. With a team, each process checks a share of the files, and the blends may be used
    when all of them have returned.

    Args:
        vocab_size: of the model without padding; tokens must be below it.
        cache: verdicts on files, or the folder that they are kept in, such as the run's; None: nowhere.
        validate: check indexes and tokens as `data.check` says, beyond what opening the files checks.
        team, report: as `check_sources` takes them.

    Raises:
        DataError: naming the file and the offset of what is wrong.
    """
    opened: dict[SourceConfig, TokenSource] = {}

    def blend(configs: Sequence[SourceConfig], purpose: int) -> Blend:
        datasets = []
        for i, source_config in enumerate(configs):
            # The weight is no part of the key: a source may be in both blends.
            key = source_config.model_copy(update={"weight": 1.0})
            if key not in opened:
                opened[key] = open_source(source_config, vocab_size)
            seed = hash_integers(config.seed, purpose, i)
            datasets.append(FixedLengthDataset(opened[key], config.sequence_length, seed))
        return Blend(datasets, [source_config.weight for source_config in configs])

    train = blend(config.train, 0)
    validation = blend(config.validation, 1) if config.validation else None
    sources = list(opened.values())
    mode = choose_mode(config.check, sources) if validate else None
    if mode is not None:
        verdicts = cache if isinstance(cache, VerdictCache) else VerdictCache(cache)
        check_sources(sources, vocab_size, mode, verdicts, team, report)
    return train, validation
