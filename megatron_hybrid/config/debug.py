"""Debugging and profiling of a run. Everything is off by default, except what costs nothing until something goes wrong."""

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from megatron_hybrid.base.errors import ConfigError, Problems
from megatron_hybrid.base.section import Section
from megatron_hybrid.config.train import TrainConfig


class DebugConfig(Section):
    """Records that a run makes of itself, for debugging and profiling."""

    profile_step_start: PositiveInt | None = None
    """First step that torch's profiler records. None: do not profile. Traces are written to run_dir/profiles."""
    profile_step_end: PositiveInt | None = None
    """Last step that torch's profiler records. None: profile_step_start alone."""
    profile_ranks: tuple[NonNegativeInt, ...] = Field((0,), strict=False)
    """Ranks that profile."""
    record_memory_history: bool = False
    """Record allocations on GPUs. A rank that runs out of GPU memory writes a snapshot to run_dir/memory, for
    https://pytorch.org/memory_viz."""
    nvtx_ranges: bool = False
    """Mark steps, and megatron-core's phases of them, with NVTX ranges for Nsight Systems. GPUs only."""
    manual_gc_interval: PositiveInt | None = None
    """Steps between collections of Python's garbage collector, which otherwise stops ranks at different times. None: automatic."""
    straggler_interval: PositiveInt | None = None
    """Steps between reports of the slowest rank. None: no reports."""
    attribute_nonfinite: bool = True
    """Run a step again if its loss or gradient norm is not finite, and report rank, layer and parameter. It costs one step for the
    first of consecutive bad steps."""

    @model_validator(mode="after")
    def _check(self) -> "DebugConfig":
        start, end = self.profile_step_start, self.profile_step_end
        if end is not None and start is None:
            raise ConfigError.at(
                "profile_step_end", f"{end} needs profile_step_start; set it to {end}, or both to null"
            )
        if start is not None and end is not None and end < start:
            raise ConfigError.at(
                "profile_step_end", f"{end} is before profile_step_start = {start}; give at least {start}"
            )
        return self


def check_debug(train: TrainConfig, debug: DebugConfig, problems: Problems) -> None:
    """Check that the engine can do what `debug` asks for."""
    if train.engine == "deepspeed" and debug.straggler_interval is not None:
        problems.add("debug.straggler_interval", "needs train.engine = megatron; set it to null")
