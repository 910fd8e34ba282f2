"""Callback that moves a run through the stages of its curriculum."""

from collections.abc import Mapping
from typing import Any

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.data.curriculum import Curriculum
from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome
from megatron_hybrid.train.callbacks.periodic_evaluation import PeriodicEvaluation


class CurriculumProgress(Callback):
    """Begins the next stage of `data.curriculum` early where an evaluation reaches the accuracy of the stage.

    Stages that have had their samples end without it. Writes `size` to the console when it changes, and the first sample of each
    stage into checkpoints. All ranks decide alike, because results of evaluations are the same on every rank.

    Raises:
        ConfigError: the batch size has changed, and a batch would have samples of two stages.
    """

    name = "curriculum"

    def __init__(self, evaluation: PeriodicEvaluation | None) -> None:
        self._evaluation = evaluation
        self._curriculum: Curriculum | None = None
        self._stage = 0

    def setup(self, run: Run) -> None:
        self._curriculum = run.curriculum

    def start(self, run: Run) -> None:
        samples, size = run.progress.samples, run.config.train.global_batch_size
        for start in self._of(run).starts:
            if start > samples and (start - samples) % size:
                raise ConfigError.at(
                    "train.global_batch_size",
                    f"{size} would put samples of two stages into a batch: the run has read {samples} samples, and a stage of "
                    f"data.curriculum begins at sample {start}; use the batch size with which the run began",
                )
        self._stage = self._of(run).stage_at(samples)
        self._report(run)

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        curriculum, samples = self._of(run), run.progress.samples
        if self._is_mastered(curriculum, samples):
            curriculum.advance(samples)
            run.loader.discard_read_ahead()
        if (stage := curriculum.stage_at(samples)) != self._stage:
            self._stage = stage
            self._report(run)

    def _is_mastered(self, curriculum: Curriculum, samples: int) -> bool:
        """Return True if the accuracy ends the stage of the step that has just ended."""
        number = curriculum.stage_at(samples)
        stage = curriculum.stages[number]
        if number != self._stage or number == len(curriculum.stages) - 1 or stage.accuracy is None:
            return False
        results = self._evaluation.results if self._evaluation is not None else {}
        result = results.get(stage.validation or "")
        return result is not None and result.accuracy is not None and result.accuracy >= stage.accuracy

    def _report(self, run: Run) -> None:
        curriculum = self._of(run)
        stage = f"stage {self._stage + 1} of {len(curriculum.stages)}"
        run.logger.info(
            f"curriculum: {stage}, size {curriculum.stages[self._stage].size}, from step {run.progress.step + 1} on"
        )

    @staticmethod
    def _of(run: Run) -> Curriculum:
        assert run.curriculum is not None
        return run.curriculum

    def state_dict(self) -> dict[str, Any]:
        assert self._curriculum is not None
        return self._curriculum.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert self._curriculum is not None
        self._curriculum.load_state_dict(state)
