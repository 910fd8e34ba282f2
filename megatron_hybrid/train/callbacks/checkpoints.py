"""Callback that loads the checkpoint a run starts from and saves its checkpoints."""

from pathlib import Path

from megatron_hybrid.checkpoint.folders import complete_checkpoints
from megatron_hybrid.checkpoint.manager import CheckpointManager
from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome
from megatron_hybrid.train.random_state import get_random_state, set_random_state
from megatron_hybrid.train.start import set_later_aside


class Checkpoints(Callback):
    """Saves every `checkpoint.interval` steps, after the last step, and when the run is asked to stop.

    Writes `run_dir/checkpoints/step-N`. When a run is rewound, later checkpoints move to `checkpoints/set-aside-N`. Do not
    use it for measurements on a file system without room for a checkpoint.
    """

    def __init__(self) -> None:
        self._set_aside: Path | None = None

    def setup(self, run: Run) -> None:
        config, run_dir = run.config, Path(run.config.run_dir)
        self.manager = CheckpointManager(
            config.checkpoint,
            run_dir / "checkpoints",
            run.engine.collector(),
            config.model.architecture(),
            config.model_dump(mode="json"),
        )
        self._load(run)
        if run.launch.rank == 0 and run.start.kind == "rewind":
            assert run.start.folder is not None
            self._set_aside = set_later_aside(run_dir, run.start.folder)
        if run.start.continues:
            self.manager.own = complete_checkpoints(self.manager.root)

    def _load(self, run: Run) -> None:
        if run.start.folder is None:
            return
        state, local = self.manager.load(run.start.folder, run.start.take)
        if state:
            run.load_state_dict(state)
        if local:
            set_random_state(local)

    def start(self, run: Run) -> None:
        for line in (*run.changes, str(run.start)):
            run.logger.info(line)
        if self._set_aside:
            run.logger.info(
                f"later checkpoints and a copy of the metrics are in {self._set_aside}; remove it to free the space"
            )

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        step, interval = run.progress.step, run.config.checkpoint.interval
        if run.stop or (interval and step % interval == 0) or step == run.config.train.steps:
            with run.logger.pause():
                self.manager.save(step, run.state_dict(), get_random_state())
        self.manager.check()

    def finish(self, run: Run) -> None:
        step, steps = run.progress.step, run.config.train.steps
        if run.stop and step < steps:
            self.manager.close()
            run.logger.info(f"asked to stop: saved step {step} of {steps}; run it again to go on")

    def close(self) -> None:
        self.manager.close()
