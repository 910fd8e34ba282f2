"""The file of stages: `stages.yaml`."""

import re
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from megatron_hybrid.base import nearest, yaml_text
from megatron_hybrid.base.errors import ConfigError, Problems, join, shown
from megatron_hybrid.base.section import Section
from megatron_hybrid.config.checkpoint import Take
from megatron_hybrid.config.command_line import read_text
from megatron_hybrid.config.translate import translate

_AVERAGE = re.compile(r"average\(([^()]*)\)")


class StageConfig(Section):
    """One stage: a run, and the stage that it starts from."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,60}$")
    """Name of the stage: lower case letters, digits, `-` and `_`. Its run_dir is `folder`/NAME."""
    config: str = Field(min_length=1)
    """The run's YAML file, relative to the file of stages. Stages may share a file, or extend one another's (`extends:`)."""
    overrides: tuple[str, ...] = Field((), strict=False)
    """`section.key=value` over the file."""
    start_from: str | None = Field(None, alias="from")
    """`pretrain`: the last checkpoint of that stage. `average(midtrain-a, midtrain-b)`: the average of the last checkpoints of these
    stages. None: initial weights, or what checkpoint.init_from of the run names."""
    take: Take = "weights"
    """What the stage takes from there, as checkpoint.take."""
    slurm: tuple[str, ...] = Field((), strict=False)
    """Further options of sbatch for this stage."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the stages that this one needs."""
        if self.start_from is None:
            return ()
        found = _AVERAGE.fullmatch(self.start_from.strip())
        return tuple(name.strip() for name in found[1].split(",")) if found else (self.start_from.strip(),)

    @property
    def averages(self) -> bool:
        """True if the stage starts from an average."""
        return self.start_from is not None and _AVERAGE.fullmatch(self.start_from.strip()) is not None


class SlurmConfig(Section):
    """Submission of stages as jobs of SLURM."""

    script: str = "examples/pretrain_hybrid_7b.sh"
    """Batch script of a stage, relative to the project's folder. It reads the run's file from CONFIG, and overrides from its
    arguments."""
    options: tuple[str, ...] = Field((), strict=False)
    """Options of sbatch for every stage: `[--nodes=16, --gpus-per-node=8]`."""
    average_options: tuple[str, ...] = Field(("--nodes=1", "--ntasks=1"), strict=False)
    """Options of sbatch for averages."""


class StagesConfig(Section):
    """A list of stages, in an order in which they can run."""

    folder: str = Field(min_length=1)
    """Folder of all stages: their run_dirs, averages, and loss.png, the loss of all of them."""
    stages: tuple[StageConfig, ...] = Field(min_length=1, strict=False)
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="after")
    def _check(self) -> "StagesConfig":
        problems, known = Problems(), list[str]()
        for number, stage in enumerate(self.stages):
            self._check_stage(stage, number, known, problems)
            known.append(stage.name)
        problems.raise_if_any()
        return self

    @staticmethod
    def _check_stage(stage: StageConfig, number: int, known: list[str], problems: Problems) -> None:
        if stage.name in known:
            problems.add(join("stages", number, "name"), f"{stage.name} is the name of an earlier stage; give another")
        field = join("stages", number, "from")
        for name in stage.inputs:
            if name not in known:
                hint = nearest.word(name, known) if known else None
                remedy = f"the nearest is {hint}" if hint else "the first stage starts from initial weights; remove it"
                problems.add(field, f"{shown(name)} is not an earlier stage; {remedy}")
        if stage.averages and len(set(stage.inputs)) < 2:
            problems.add(field, f"{shown(stage.start_from)} names fewer than two stages; name the stages to average")
        if stage.start_from is None and stage.take != "weights":
            problems.add(join("stages", number, "take"), f"{stage.take} has nothing to take from; name a stage in from")
        if stage.averages and stage.take == "everything":
            problems.add(join("stages", number, "take"), "everything of an average is its moments; write moments")


def load_stages(path: Path) -> StagesConfig:
    """Return the stages of a YAML file.

    Raises:
        ConfigError: lists every wrong field with its remedy.
    """
    data = yaml_text.read(read_text("stages", path), str(path))
    if not isinstance(data, dict):
        raise ConfigError.at(str(path), f"holds {shown(data)}; write folder and stages")
    try:
        return StagesConfig.model_validate(data)
    except ValidationError as error:
        raise translate(error, StagesConfig) from None
