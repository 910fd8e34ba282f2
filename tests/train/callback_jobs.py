"""Jobs of test_callbacks.py, which run on ranks."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.start import start_distributed
from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome
from megatron_hybrid.train.trainer import Trainer


class Recorder(Callback):
    """Records its hooks and, as its state, the steps that it has seen. May skip an update and stop the run."""

    name = "recorder"

    def __init__(self, skip_at: int | None, stop_at: int | None) -> None:
        self.skip_at, self.stop_at = skip_at, stop_at
        self.hooks: list[str] = []
        self.seen: list[int] = []

    def setup(self, run: Run) -> None:
        self.hooks.append("setup")

    def start(self, run: Run) -> None:
        self.hooks.append("start")

    def begin_step(self, run: Run) -> None:
        self.hooks.append("begin_step")
        self.step = run.progress.step + 1

    def reason_to_skip(self, loss: float, grad_norm: float) -> str | None:
        self.hooks.append("reason_to_skip")
        return "recorder says so" if self.step == self.skip_at else None

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        self.hooks.append("end_step")
        self.seen.append(run.progress.step)
        run.stop = run.progress.step == self.stop_at

    def finish(self, run: Run) -> None:
        self.hooks.append("finish")

    def close(self) -> None:
        self.hooks.append("close")

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = list(state["seen"])


def recorded(config: dict[str, Any], skip_at: int | None = None, stop_at: int | None = None) -> dict[str, Any]:
    """Train with a Recorder. Returns its record and the progress of the run."""
    run, recorder = RunConfig(**config), Recorder(skip_at, stop_at)
    groups = start_distributed(Launch.from_environment(), run.parallel, run.train.seed)
    with Trainer(run, Launch.from_environment(), groups, callbacks=[recorder]) as trainer:
        progress = trainer.run()
    return {"hooks": recorder.hooks, "seen": recorder.seen, "progress": asdict(progress)}
