"""The interface of callbacks: everything that a run does around its steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.curriculum import Curriculum
from megatron_hybrid.data.loader import BatchLoader
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.observe import RunLogger
from megatron_hybrid.train.engines.base import Engine
from megatron_hybrid.train.engines.losses import BatchLosses
from megatron_hybrid.train.progress import Progress
from megatron_hybrid.train.start import Start


class Run(Protocol):
    """The part of the trainer that callbacks use."""

    config: RunConfig
    launch: Launch
    start: Start
    """What the run starts from."""
    changes: list[str]
    """A line for each setting that changed since the checkpoint that the run starts from."""
    engine: Engine
    progress: Progress
    logger: RunLogger
    """Available from `Callback.start` on."""
    stop: bool
    """Set it to end the run after the current step."""
    batches: list[Batch]
    """This rank's micro-batches of the current step."""
    loader: BatchLoader
    curriculum: Curriculum | None
    """Sizes of generated samples."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run for a checkpoint: JSON values, the same on every rank."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint."""


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of one training step, the same on every rank."""

    losses: BatchLosses
    grad_norm: float
    lr: float
    batch_size: int
    skipped: str | None
    """Why the update was skipped; None: it was not."""

    @property
    def is_finite(self) -> bool:
        """False if loss or gradient norm is not finite. Batches without a token that counts have no loss, and are finite."""
        return self.losses.weight == 0 or (math.isfinite(self.losses.loss) and math.isfinite(self.grad_norm))


class Callback:
    """Base class of callbacks. All hooks do nothing; override those that you need.

    Every rank calls the hooks of all callbacks in the same order, that of `default_callbacks`. So hooks may communicate.
    """

    name: ClassVar[str] = ""
    """Key of the callback's state in checkpoints. Empty: the callback has no state."""

    def setup(self, run: Run) -> None:
        """Prepare, once the engine is built. There is no logger yet."""

    def start(self, run: Run) -> None:
        """Report the start of the run."""

    def begin_step(self, run: Run) -> None:
        """Run before a step. `run.progress` counts the steps before it."""

    def reason_to_skip(self, loss: float, grad_norm: float) -> str | None:
        """Return why the update of this step must be skipped; None: update. Called once per step whose batch has
        tokens that count.
        """
        return None

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        """Run after a step, updated or skipped. `run.progress` includes it."""

    def finish(self, run: Run) -> None:
        """Run after the last step. Not called after an error."""

    def close(self) -> None:
        """Release resources. Also called after an error."""

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values to save in checkpoints under `name`, the same on every rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Not called when the checkpoint has no state of this callback."""
