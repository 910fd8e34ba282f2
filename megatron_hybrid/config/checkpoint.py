"""Checkpoints: when to save, which to keep, where to start."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.base.section import Section

Take = Literal["weights", "moments", "everything"]
"""Parts of a checkpoint that a run takes."""


class CheckpointConfig(Section):
    """When to save checkpoints, which to keep, and where to start."""

    interval: PositiveInt | None = 1000
    """Steps between checkpoints. None: save only after the last step. Steps whose loss or gradient norm is not finite are left out."""
    keep_last: PositiveInt | None = 2
    """Number of the run's newest checkpoints to keep. None: all."""
    keep_every: PositiveInt | None = None
    """Keep checkpoints whose step is a multiple of this permanently. It must be a multiple of interval."""
    async_save: bool = False
    """Write checkpoints in the background while training continues. Each rank keeps a copy of its state in host memory."""
    resume: str = Field("auto", min_length=1)
    """Checkpoint to continue from, with the optimizer's state and the position in the data. `auto`: the run's newest complete
    checkpoint, or a new run if it has none. `none`: a new run; an error if run_dir has checkpoints. A folder: that checkpoint.
    A run that began from another run's checkpoint resumes its own. An earlier checkpoint of the run itself rewinds the run:
    later checkpoints are set aside, not deleted. The same command again, with an unchanged configuration, does not rewind the run
    again: it resumes the newest checkpoint."""
    verify: Literal["full", "sizes"] = "full"
    """Check of the checkpoint that the run starts from. `full`: compare the SHA-256 of every file, shared by all ranks. `sizes`:
    compare only the index and the sizes of files."""
    init_from: str | None = Field(None, min_length=1)
    """Folder of another run's checkpoint, from which a new run starts. `take` says what the run takes from it. Once the run has
    checkpoints, it resumes the newest of them."""
    take: Take = "weights"
    """What a new run takes from init_from. `weights`: nothing but weights. `moments`: also the optimizer's moments, with the number of
    updates that their bias correction needs, and the scales of FP8. With both, step, schedule, position in the data, window of
    skip_step and random state start fresh; the rotary embedding, data and schedule may change; another tokenizer or model is an
    error. `everything`: continue where the other run stopped, as `resume` does."""
    allow_changes: tuple[str, ...] = Field((), strict=False)
    """Fields of `data` and `model` that may differ from those of the run that saved the checkpoint: `[data.seed]`, or
    `[data, model.rope_theta]`. Other changes that repeat or skip samples, or that change the model, are errors."""

    @model_validator(mode="after")
    def _check(self) -> "CheckpointConfig":
        if self.init_from is not None and self.resume not in ("auto", "none"):
            raise ConfigError.at(
                "init_from",
                f"{self.init_from} is a second checkpoint to start from: resume is {self.resume}; set resume to auto, or this to null",
            )
        if self.init_from is None and self.take != "weights":
            raise ConfigError.at(
                "take", f"{self.take} needs a checkpoint to take from; name its folder in init_from, or leave this out"
            )
        for name in self.allow_changes:
            if name.partition(".")[0] not in ("data", "model"):
                raise ConfigError.at(
                    "allow_changes",
                    f"{name} is no field of data or model; other fields may change without it: leave it out",
                )
        if self.keep_every is None:
            return self
        if self.interval is None:
            raise ConfigError.at(
                "keep_every",
                f"{self.keep_every} has nothing to keep while interval is null; set it to null too",
            )
        if self.keep_every % self.interval:
            best = nearest.multiple(self.keep_every, self.interval)
            raise ConfigError.at(
                "keep_every",
                f"{self.keep_every} is not a multiple of checkpoint.interval = {self.interval}; the nearest is {best}",
            )
        return self
