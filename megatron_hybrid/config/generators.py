"""Sample generators: training data that is made while the run reads it, and the registry of their kinds.

To add a kind to this project, add its module to BUILT_IN. A plug-in, named by a run's `plugins`, calls `register` when it is imported.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, PositiveInt, SerializeAsAny, ValidationError

from megatron_hybrid.arch.packing import round_up
from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import ConfigError, UserError, shown
from megatron_hybrid.base.section import Section
from megatron_hybrid.config.translate import translate

if TYPE_CHECKING:
    import numpy as np  # validation alone does without it

BUILT_IN = (
    "megatron_hybrid.data.synthetic.state_tracking",
    "megatron_hybrid.data.synthetic.recall",
    "megatron_hybrid.data.synthetic.state_based_recall",
)
"""Imported on first use, by name, so that config imports nothing of data."""
LENGTH_MULTIPLE = 64
"""Samples are padded to a multiple of this number of tokens."""


@dataclass(frozen=True)
class GeneratedTokens:
    """One text and the places of its answers."""

    tokens: "np.ndarray"
    """int64 [number of tokens]."""
    answers: Sequence[int]
    """Ascending places of the tokens that follow from the tokens before them. The last one answers the whole task."""


class SampleGenerator(Section, ABC):
    """Options of a generator, and the generator itself: every sample follows from its size and a stream of random numbers.

    A subclass sets the default of `task`, which names the kind.
    """

    task: str
    """Kind of the generator: state_tracking, recall, state_based_recall, or one that a plug-in brings."""
    size: PositiveInt
    """Size of the problem, such as the number of swaps. data.curriculum changes it during training."""
    labels: Literal["all", "answers", "last"] = "answers"
    """Labels that count in the loss and the accuracy. all: every token; answers: tokens that follow from those before them; last: the
    final answer."""
    show_answers: bool = True
    """False: the model's input has padding in place of every answer, so that an assertion tells it nothing about those that follow."""

    @property
    @abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """The text of each token id. Id 0 is padding."""

    def size_problem(self, size: int) -> str | None:
        """Return why there are no samples of a size, with the remedy; None: there are."""
        return None

    @abstractmethod
    def length(self, size: int) -> int:
        """Return the largest number of tokens of a text of a size."""

    @abstractmethod
    def generate(self, size: int, random: "np.random.Generator") -> GeneratedTokens:
        """Return one text. Several threads may call this."""


_kinds: dict[str, type[SampleGenerator]] = {}


def register(kind: type[SampleGenerator]) -> None:
    """Add a kind of generator.

    Raises:
        UserError: another kind has its name.
    """
    name = kind.model_fields["task"].default
    if kind.__module__ not in BUILT_IN:
        generator_kinds()  # so that a name that a built-in kind has is refused
    other = _kinds.setdefault(name, kind)
    if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        raise UserError(
            f"plugins: {other.__module__} and {kind.__module__} both name a generator {name}; rename one of them"
        )


def generator_kinds() -> Mapping[str, type[SampleGenerator]]:
    """Return all kinds by name."""
    for name in BUILT_IN:
        import_module(name)
    return _kinds


def _of_its_kind(value: object) -> object:
    """Replace the options of a generator by an object of its kind."""
    if not isinstance(value, Mapping):
        return value
    kinds, name = generator_kinds(), value.get("task")
    if not isinstance(name, str) or name not in kinds:
        best = nearest.word(name, kinds) if isinstance(name, str) else next(iter(kinds))
        raise ConfigError.at("task", f"{shown(name)} is not one of {', '.join(kinds)}; the nearest is {best}")
    try:
        return kinds[name].model_validate(value)
    except ValidationError as error:
        raise translate(error, kinds[name]) from None


Generator = Annotated[SerializeAsAny[SampleGenerator], BeforeValidator(_of_its_kind)]


def sample_length(generators: Sequence[SampleGenerator], size: int | None = None) -> int:
    """Return the number of tokens of the samples of a blend, padding included.

    Args:
        size: None: each generator's own.
    """
    longest = max(generator.length(size or generator.size) - 1 for generator in generators)
    return round_up(longest, LENGTH_MULTIPLE)
