"""Samples of generators (config/generators.py) for the data loader."""

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_hybrid.config.generators import SampleGenerator, sample_length
from megatron_hybrid.data.curriculum import Curriculum
from megatron_hybrid.data.sample import Sample, SampleCounts

ENDLESS = 1 << 48
"""Samples of a dataset that never repeats one."""


class GeneratedDataset:
    """Endless fresh samples. Sample n follows from n, the seed and its size alone.

    Args:
        sequence_length: length of the longest sample.
        curriculum: sizes of the samples; None: the generator's own.
        lengths: length of the samples of each size, padding included; of the generator's own under None.
    """

    samples_per_epoch = ENDLESS

    def __init__(
        self,
        generator: SampleGenerator,
        seed: int,
        sequence_length: int,
        curriculum: Curriculum | None,
        lengths: Mapping[int | None, int],
    ) -> None:
        self.generator, self.sequence_length, self.curriculum = generator, sequence_length, curriculum
        self._seed, self._lengths = seed, lengths

    @property
    def name(self) -> str:
        """Name in messages and metrics."""
        return self.generator.task

    def sample(self, index: int, place: int | None = None) -> Sample:
        """Return the sample with this index, padded at its end. Several threads may call this.

        Args:
            place: index in the blend, by which the curriculum counts; None: the same.
        """
        size = self.curriculum.size_at(index if place is None else place) if self.curriculum else None
        random = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, 0, index]))
        text = self.generator.generate(size or self.generator.size, random)
        counted = self._counted(text.answers, len(text.tokens))
        hidden = () if self.generator.show_answers else text.answers[:-1]
        return pad(text.tokens, counted, self._lengths[size], hidden)

    def _counted(self, answers: Sequence[int], tokens: int) -> list[int]:
        """Return the places of the tokens that count as labels."""
        match self.generator.labels:
            case "all":
                return [*range(1, tokens)]
            case "answers":
                return [*answers]
            case "last":
                return [answers[-1]]


def generated_datasets(
    generators: Sequence[SampleGenerator], seeds: Sequence[int], curriculum: Curriculum | None
) -> list[GeneratedDataset]:
    """Return a dataset of each generator of a blend. Samples of one size are padded to one length.

    Args:
        curriculum: None: each generator has its own size.
    """
    sizes = {stage.size for stage in curriculum.stages} if curriculum else {None}
    lengths = {size: sample_length(generators, size) for size in sizes}
    longest = max(lengths.values())
    return [
        GeneratedDataset(generator, seed, longest, curriculum, lengths)
        for generator, seed in zip(generators, seeds, strict=True)
    ]


def pad(tokens: np.ndarray, counted: list[int], length: int, hidden: Sequence[int] = ()) -> Sample:
    """Return the sample of a text, padded with token 0.

    Args:
        tokens: int64 [at most length + 1].
        counted: places of the tokens whose label counts in the loss.
        hidden: places of tokens that are labels and not part of the input.
    """
    padded = np.zeros(length + 1, np.int64)
    padded[: len(tokens)] = tokens
    inputs = padded[:-1].copy()
    inputs[list(hidden)] = 0
    mask = np.zeros(length, np.float32)
    mask[np.asarray(counted) - 1] = 1.0
    used = len(tokens) - 1
    counts = SampleCounts(length, len(counted), filtered=used - len(counted), padding=length - used)
    return Sample(inputs, padded[1:], mask, None, counts)
