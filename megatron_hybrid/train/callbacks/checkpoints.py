"""Callback that loads the checkpoint a run starts from and saves its checkpoints."""

import time
from contextlib import suppress
from pathlib import Path

from megatron_hybrid.base.heartbeat import heartbeat
from megatron_hybrid.checkpoint.format import CheckpointError
from megatron_hybrid.checkpoint.manager import CheckpointManager
from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome
from megatron_hybrid.train.random_state import get_random_state, set_random_state
from megatron_hybrid.train.start import set_later_aside

_MOST_FILES = 64
"""Files whose sizes are looked at, so that many ranks do not load a file system's metadata server."""


def saves_now(run: Run, outcome: StepOutcome) -> bool:
    """Return True if a checkpoint is saved after the step that has just ended.

    None is saved at the interval while the loss is not finite: the weights may be the cause.
    """
    step, interval = run.progress.step, run.config.checkpoint.interval
    at_interval = bool(interval and step % interval == 0) and outcome.is_finite
    return run.stop or at_interval or step == run.config.train.steps


class Checkpoints(Callback):
    """Saves every `checkpoint.interval` steps, after the last step, and when the run is asked to stop.

    After a step whose loss or gradient norm is not finite, nothing is saved at the interval, and no earlier checkpoint is removed.
    Writes `run_dir/checkpoints/step-N`. When a run is rewound, later checkpoints move to `checkpoints/set-aside-N`. Do not
    use it for measurements on a file system without room for a checkpoint.
    """

    def __init__(self) -> None:
        self._set_aside: Path | None = None
        self._saving: tuple[int, float] | None = None
        """Step that is being saved, and when its save began."""

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
            # after damage, keep what has been read back from this disk; the next start counts it again
            self.manager.adopt_own(keep=run.start.folder if run.start.fell_back else None)

    def _load(self, run: Run) -> None:
        if run.start.folder is None:
            return
        with heartbeat.doing(f"reading {run.start.folder.name}", section="setup"):
            state, local = self.manager.load(run.start.folder, run.start.take)
        if state:
            try:
                run.load_state_dict(state)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(
                    f"{run.start.folder}: the run's state in it is damaged ({error!r:.200}); use an earlier checkpoint"
                ) from error
        if local:
            set_random_state(local)

    def start(self, run: Run) -> None:
        for line in (*run.start.notes, *run.changes, str(run.start)):
            run.logger.info(line)
        if self._set_aside:
            run.logger.info(
                f"later checkpoints and a copy of the metrics are in {self._set_aside}; remove it to free the space"
            )

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        if saves_now(run, outcome):
            step = run.progress.step
            began = time.monotonic()
            with run.logger.pause(), heartbeat.doing(f"saving step {step}", self._progress, "checkpointing"):
                self.manager.save(step, run.state_dict(), get_random_state(), removes_old=outcome.is_finite)
            self._report_save(run)  # of the step before, for which this save has waited
            self._saving = step, began
        self.manager.check()
        if not self.manager.in_progress:
            self._report_save(run)

    def _report_save(self, run: Run) -> None:
        if self._saving is not None:
            step, began = self._saving
            run.logger.info(f"saved step {step} in {time.monotonic() - began:.1f} s")
            self._saving = None

    def finish(self, run: Run) -> None:
        self.close()
        self._report_save(run)
        step, steps = run.progress.step, run.config.train.steps
        if run.stop and step < steps:
            run.logger.info(f"asked to stop: saved step {step} of {steps}; to resume, run the same command again")

    def close(self) -> None:
        with heartbeat.doing("waiting for the checkpoint that is being written", self._progress, "checkpointing"):
            self.manager.close()

    def _progress(self) -> object:
        """Return what changes while any rank writes or removes a checkpoint: names, and sizes of some files."""
        folders = sorted(self.manager.root.glob(".*"))
        files = [file for folder in folders for file in sorted(folder.glob("*"))]
        with suppress(OSError):  # renamed or removed meanwhile
            sizes = [file.stat().st_size for file in files[:: 1 + len(files) // _MOST_FILES]]
            return len(files), sizes
        return len(files)
