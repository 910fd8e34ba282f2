"""The work of a list of stages: runs and averages, what each needs, and which of them are done.

The state is that of the folders: a run is done when it has the checkpoint of its last step, an average when its folder exists.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_hybrid.checkpoint.folders import checkpoint_step, complete_checkpoints
from megatron_hybrid.checkpoint.format import INDEX
from megatron_hybrid.config.load import load_run
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.stages.config import StageConfig, StagesConfig


@dataclass(frozen=True)
class Average:
    """An average of stages' last checkpoints."""

    name: str
    folder: Path
    sources: tuple[Path, ...]
    moments: bool
    needs: tuple[str, ...]

    @property
    def done(self) -> bool:
        """True if it has been made. It is written to another folder and renamed."""
        return (self.folder / INDEX).is_file()

    @property
    def state(self) -> str:
        """State in words."""
        return "done" if self.done else "to do"

    @property
    def arguments(self) -> list[str]:
        """Arguments of megatron-hybrid average."""
        moments = ["--moments"] if self.moments else []
        return [*map(str, self.sources), "--out", str(self.folder), "--quiet", *moments]


@dataclass(frozen=True)
class Training:
    """A stage's run."""

    name: str
    config_file: Path
    overrides: tuple[str, ...]
    start: tuple[str, ...]
    """Overrides that name the starting point."""
    needs: tuple[str, ...] = ()
    slurm: tuple[str, ...] = field(default=())

    def run(self, with_start: bool = False) -> RunConfig:
        """Return the run's configuration.

        Args:
            with_start: with the starting point, whose checkpoint need not exist.
        """
        return load_run(str(self.config_file), (*self.overrides, *(self.start if with_start else ())))

    @property
    def last_checkpoint(self) -> Path:
        """Folder of the checkpoint of its last step."""
        run = self.run()
        return Path(run.run_dir) / "checkpoints" / f"step-{run.train.steps:08d}"

    @property
    def done(self) -> bool:
        """True if the run has the checkpoint of its last step."""
        return (self.last_checkpoint / INDEX).is_file()

    @property
    def state(self) -> str:
        """State in words."""
        saved = complete_checkpoints(self.last_checkpoint.parent)
        if self.done:
            return "done"
        return f"saved step {checkpoint_step(saved[-1])}" if saved else "to do"

    @property
    def arguments(self) -> list[str]:
        """Overrides of megatron-hybrid pretrain."""
        return [*self.overrides, *self.start]


Work = Average | Training


def plan_work(config: StagesConfig, file: Path, overrides: Sequence[str] = ()) -> list[Work]:
    """Return the runs and averages, each after those that it needs.

    Args:
        file: the file of stages, to which the runs' files are relative.
        overrides: `section.key=value` for the runs of all stages.

    Raises:
        ConfigError: a run's configuration is wrong.
    """
    folder = Path(config.folder).resolve()
    trainings: dict[str, Training] = {}
    work: list[Work] = []
    for stage in config.stages:
        start, needs = None, stage.inputs
        if stage.averages:
            average = _average(folder, stage, [trainings[name] for name in stage.inputs])
            if average not in work:
                work.append(average)
            start, needs = average.folder, (average.name,)
        elif stage.inputs:
            start = trainings[stage.inputs[0]].last_checkpoint
        given = (*stage.overrides, *overrides, f"run_dir={folder / stage.name}")
        named = (f"checkpoint.init_from={start}", f"checkpoint.take={stage.take}") if start else ()
        trainings[stage.name] = Training(stage.name, file.parent / stage.config, given, named, needs, stage.slurm)
        trainings[stage.name].run(with_start=True)
        work.append(trainings[stage.name])
    return work


def _average(folder: Path, stage: StageConfig, sources: list[Training]) -> Average:
    moments = stage.take == "moments"
    name = "-".join(["average", *stage.inputs, *(["moments"] if moments else [])])
    return Average(name, folder / name, tuple(source.last_checkpoint for source in sources), moments, stage.inputs)
