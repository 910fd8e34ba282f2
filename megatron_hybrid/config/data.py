"""Training and validation data."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_serializer,
    model_validator,
)

from megatron_hybrid.base.errors import ConfigError, Problems, join, shown
from megatron_hybrid.base.section import Section
from megatron_hybrid.config.generators import Generator


class SourceConfig(Section):
    """One dataset of a blend: files of tokens (`path`), or a generator of samples."""

    path: str = ""
    """A megatron-core prefix (`PREFIX.bin`, `PREFIX.idx`), a `.npy` raw token shard, or a glob of such shards."""
    generator: Generator | None = None
    """Generator of fresh samples instead of files: `{task: state_tracking, size: 128}` (docs/guides/data.md)."""
    weight: NonNegativeFloat = 1.0
    """Weight of the source in the blend, relative to the other sources. 0: none of its samples, until data.mix_changes gives it a
    weight."""
    dtype: Literal["uint16", "uint32"] | None = None
    """Token type of a raw shard. None: the smallest that holds the vocabulary."""

    @model_validator(mode="after")
    def _check(self) -> "SourceConfig":
        problems = Problems()
        if self.generator is not None and self.path:
            problems.add("generator", f"does not go with path = {self.path}; remove one of them")
        elif self.generator is None and not self.path:
            problems.add("path", "is missing; give the prefix or the shards of a dataset, or a generator")
        for ending in (".bin", ".idx"):
            if self.path.endswith(ending):
                problems.add(
                    "path",
                    f"{self.path} is one file of a pair; give their prefix, {self.path.removesuffix(ending)}",
                )
        if self.dtype is not None and not self.path.endswith(".npy") and self.path:
            problems.add(
                "dtype",
                f"{self.dtype} is for raw .npy shards, and an indexed dataset stores its type; leave it out, or give a "
                "path that ends in .npy",
            )
        problems.raise_if_any()
        return self


class MixChangeConfig(Section):
    """Weights of the training sources from a number of tokens on."""

    after_tokens: PositiveInt
    """Tokens that the run has read before, rounded up to whole samples."""
    weights: tuple[NonNegativeFloat, ...] = Field(min_length=1, strict=False)
    """Weight of each source of data.train, in their order. 0: none of its samples."""


def _name_sets(value: object) -> object:
    """Give a plain list of sources the name ""."""
    if isinstance(value, list | tuple):
        return {"": value} if value else {}
    if not isinstance(value, Mapping):
        raise ConfigError.at("", f"{shown(value)} is no list of sources; write [{{path: ...}}], or sets by their names")
    return value


class CurriculumStageConfig(Section):
    """A stage of training in which generated samples have one size."""

    size: PositiveInt
    """Size of the samples, such as the number of swaps."""
    samples: PositiveInt | None = None
    """Samples until the next stage, a multiple of train.global_batch_size. None: the last stage."""
    accuracy: float | None = Field(None, gt=0, le=1)
    """Accuracy on `validation` from which the next stage begins earlier. None: never earlier."""
    validation: str | None = None
    """Validation set that `accuracy` is measured on, every train.eval_interval steps."""

    @model_validator(mode="after")
    def _check(self) -> "CurriculumStageConfig":
        if (self.accuracy is None) != (self.validation is None):
            given, missing = ("accuracy", "validation") if self.validation is None else ("validation", "accuracy")
            raise ConfigError.at(missing, f"is missing, and {given} needs it; give both or none")
        return self


Sources = Annotated[tuple[SourceConfig, ...], Field(min_length=1, strict=False)]
ValidationSets = Annotated[Mapping[str, Sources], BeforeValidator(_name_sets)]
_SET_NAME = re.compile(r"(?!\d+$)[A-Za-z0-9_-]+")


class InstanceFilterConfig(Section):
    """Samples that are excluded from the loss because an n-gram repeats in them. The defaults are OLMo-core's."""

    repetition_min_period: PositiveInt = 1
    """Shortest n-gram, in tokens."""
    repetition_max_period: PositiveInt = 13
    """Longest n-gram, in tokens."""
    repetition_max_count: int = Field(32, ge=3)
    """Repetitions in a row from which a sample is excluded."""

    @model_validator(mode="after")
    def _check(self) -> "InstanceFilterConfig":
        if self.repetition_min_period > self.repetition_max_period:
            raise ConfigError.at(
                "repetition_min_period",
                f"{self.repetition_min_period} exceeds repetition_max_period = {self.repetition_max_period}; set it to at "
                f"most {self.repetition_max_period}",
            )
        return self


class DataConfig(Section):
    """Token sources, blended by weight into fixed-length sequences in a deterministic order."""

    train: tuple[SourceConfig, ...] = Field(min_length=1, strict=False)
    """One or more sources: `[{path: data/train}]`."""
    validation: ValidationSets = {}
    """Validation sets by name: `{docs: [{path: data/docs}], code: [{path: data/code}]}`. Each is evaluated on its own. A plain list of
    sources is one set without a name. Required by train.eval_interval."""
    mix_changes: tuple[MixChangeConfig, ...] = Field((), strict=False)
    """Other weights of the training sources later in the run: `[{after_tokens: 1_000_000_000, weights: [0.5, 0.5]}]`. Each source
    continues with its next sample."""
    curriculum: tuple[CurriculumStageConfig, ...] = Field((), strict=False)
    """Sizes of the samples of generators in data.train: `[{size: 8, samples: 16000}, {size: 16}]`. Empty: each generator's own."""
    repeat_warning: PositiveFloat = 4.0
    """Epochs of a source by the last step above which the run prints a warning."""
    sequence_length: PositiveInt
    """Tokens per sample."""
    tokenizer: str = Field("byte", min_length=1)
    """`byte`, or the folder of a Hugging Face tokenizer. Tools use it; training reads tokens."""
    documents: Literal["keep", "mask", "pack"] = "keep"
    """`keep`: samples are cut from the token stream, and documents in a sample see each other; `mask`: the same samples, in which
    documents are separated and positions restart; `pack`: whole documents are packed into samples by best fit, and only
    documents longer than a sample are split. `mask` and `pack` need document boundaries: a megatron-core index, OLMo-core's
    `.csv.gz` next to each `.npy`, or `model.eos_token_id`."""
    instance_filter: InstanceFilterConfig | None = None
    """Exclude samples with repeated n-grams from the loss; `{}` takes the defaults of OLMo-core, null excludes none."""
    seed: NonNegativeInt = 1234
    """Seed of the sample order."""
    num_workers: NonNegativeInt = 1
    """Threads that prefetch samples. 0: read in the training thread."""
    check: Literal["auto", "full", "sample", "none"] = "auto"
    """Tokens validated before the first step. `full`: all; `sample`: the beginning, the end and evenly spaced parts of every file;
    `auto`: `full` below 100 GB of tokens, else `sample`; `none`: no tokens. Training always validates each token that it reads."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        problems = Problems()
        for name in self.validation:
            if not (_SET_NAME.fullmatch(name) or self.validation.keys() == {""}):
                problems.add(
                    join("validation", name or "''"),
                    f"{name!r} does not name a validation set; use letters, digits, _ and -, and not digits alone",
                )
        problems.raise_if_any()
        return self

    @field_serializer("validation", mode="wrap")
    def _unname(self, value: Any, serialize: SerializerFunctionWrapHandler) -> Any:
        sets = serialize(value)
        return sets.get("", []) if sets.keys() <= {""} else sets

    def files(self) -> dict[str, SourceConfig]:
        """Return the sources of files by their field, as `sources` does."""
        return {field: source for field, source in self.sources().items() if source.generator is None}

    def sources(self) -> dict[str, SourceConfig]:
        """Return all sources by their field: `data.train.0`, `data.validation.code.1`, or `data.validation.1` without names."""
        lists = {"data.train": self.train} | {join("data.validation", name): s for name, s in self.validation.items()}
        return {join(field, number): source for field, found in lists.items() for number, source in enumerate(found)}
