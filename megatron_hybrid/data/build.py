"""The datasets of a run, from its configuration."""

from collections.abc import Sequence
from pathlib import Path

from megatron_hybrid.config.data import DataConfig, SourceConfig
from megatron_hybrid.data.blend import Blend
from megatron_hybrid.data.dataset import FixedLengthDataset
from megatron_hybrid.data.permutation import hash_integers
from megatron_hybrid.data.sources import TokenSource, open_source
from megatron_hybrid.data.validate import VerdictCache, validate_source


def build_train_and_validation(
    config: DataConfig, vocab_size: int, cache_dir: str | Path | None = None, validate: bool = True
) -> tuple[Blend, Blend | None]:
    """The blends that training and evaluation read; validation is None where none is configured.

    Every process of a run builds them. One process of each file system should do so first, with validate, and the
    others after it: they then find the verdicts in cache_dir.

    Args:
        vocab_size: of the model without padding; tokens must be below it.
        cache_dir: where the verdicts on files are kept, such as the run's folder; None: nowhere.
        validate: check indexes and tokens, beyond what opening the files checks.

    Raises:
        DataError: naming the file and the offset of what is wrong.
    """
    cache = VerdictCache(cache_dir)
    opened: dict[SourceConfig, TokenSource] = {}

    def blend(configs: Sequence[SourceConfig], purpose: int) -> Blend:
        datasets = []
        for i, source_config in enumerate(configs):
            # Weights do not matter to what is opened: a source may be in both blends.
            key = source_config.model_copy(update={"weight": 1.0})
            if key not in opened:
                opened[key] = open_source(source_config, vocab_size)
                if validate:
                    validate_source(opened[key], vocab_size, cache)
            seed = hash_integers(config.seed, purpose, i)
            datasets.append(FixedLengthDataset(opened[key], config.sequence_length, seed))
        return Blend(datasets, [source_config.weight for source_config in configs])

    train = blend(config.train, 0)
    return train, (blend(config.validation, 1) if config.validation else None)
