"""What the model reads."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_hybrid.config.base import Section


class SourceConfig(Section):
    """One dataset of a blend."""

    path: str
    """A megatron-core prefix (`PREFIX.bin`, `PREFIX.idx`), a `.npy` raw token shard, or a glob of such shards."""
    weight: PositiveFloat = 1.0
    """Share of the samples, relative to the other sources."""
    dtype: Literal["uint16", "uint32"] | None = None
    """Type of a raw shard's tokens; None: the smallest that holds the vocabulary."""


class DataConfig(Section):
    """Token sources, blended by weight into fixed-length sequences in a deterministic order."""

    train: tuple[SourceConfig, ...] = Field(min_length=1)
    validation: tuple[SourceConfig, ...] = ()
    sequence_length: PositiveInt
    """Tokens a sample has."""
    tokenizer: str = "byte"
    """`byte`, or the folder of a Hugging Face tokenizer. Used by tools; training reads tokens."""
    seed: NonNegativeInt = 1234
    """Of the sample order."""
    num_workers: NonNegativeInt = 1
    """Threads that read ahead; 0 reads in the training thread."""
