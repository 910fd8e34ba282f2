"""Sinks of metrics: TensorBoard and Weights & Biases."""

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.config.logging import LoggingConfig


class Sink(Protocol):
    """Receiver of the numbers of a step."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_sinks(config: LoggingConfig, run_dir: Path, writes: bool = True) -> None:
    """Check the enabled sinks before a run starts.

    Args:
        writes: True on the rank that writes, the only one that needs credentials.

    Raises:
        UserError: the package of an enabled sink is not installed, its folder is a file, or W&B has no credentials.
    """
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "logging.tensorboard = true, but the package tensorboard is not installed: pip install tensorboard, "
            "or set logging.tensorboard=false"
        )
    _check_folder("logging.tensorboard", config.tensorboard, run_dir / "tensorboard")
    _check_folder("logging.wandb_project", config.wandb_project is not None, run_dir / "wandb")
    if config.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"logging.wandb_project = {config.wandb_project!r}, but the package wandb is not installed: "
            "pip install -e '.[wandb]', or set logging.wandb_project=null"
        )
    if writes and config.wandb_project is not None and not _is_offline(config):
        _check_wandb_login()


def _check_folder(field: str, enabled: bool, folder: Path) -> None:
    if enabled and folder.exists() and not folder.is_dir():
        raise UserError(f"{field}: {folder} is a file, and the metrics need a folder there; remove it")


def _is_offline(config: LoggingConfig) -> bool:
    return config.wandb_offline or os.environ.get("WANDB_MODE") in ("offline", "disabled")


def _check_wandb_login() -> None:
    """Check that W&B has credentials, without asking its server, which may be unreachable for a while.

    Raises:
        UserError: it has none.
    """
    import wandb

    reason = "there are none"
    try:
        if wandb.login(prompt=False, verify=False):
            return
    except wandb.Error as error:
        reason = str(error)
    raise UserError(
        f"logging.wandb_project: no usable credentials of Weights & Biases: {reason}; run `wandb login`, set WANDB_API_KEY, or "
        "set logging.wandb_offline=true"
    )


def sink_makers(
    config: LoggingConfig, run_dir: Path, settings: Mapping[str, Any] | None = None, continues: bool = True
) -> dict[str, Callable[[int, bool], Sink]]:
    """Return functions that create the enabled sinks in run_dir, by name.

    They take the first step that the sink will log, and whether the sink is created again after a failure.

    Args:
        continues: True if earlier values belong to this run. If False, W&B gets a new run.
    """
    makers: dict[str, Callable[[int, bool], Sink]] = {}
    if config.tensorboard:
        makers["TensorBoard"] = lambda step, again: TensorBoardSink(run_dir / "tensorboard", step - 1)
    if config.wandb_project is not None:
        makers["Weights & Biases"] = lambda step, again: WandbSink(config, run_dir, settings, continues or again)
    return makers


class TensorBoardSink:
    """TensorBoard event files in a folder of the run."""

    def __init__(self, folder: Path, start_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step: TensorBoard hides values of an interrupted run from this step on.
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=30)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases run. Its ID is stored in `wandb_id`, and a resumed run continues it."""

    def __init__(
        self, config: LoggingConfig, run_dir: Path, settings: Mapping[str, Any] | None = None, continues: bool = True
    ) -> None:
        import wandb

        known = run_dir / "wandb_id"
        self._run = wandb.init(
            entity=config.wandb_entity,
            project=config.wandb_project,
            name=config.wandb_name or run_dir.resolve().name,
            tags=config.wandb_tags or None,
            mode="offline" if config.wandb_offline else None,  # None: WANDB_MODE, or online
            dir=str(run_dir),
            id=(known.read_text().strip() or None) if continues and known.exists() else None,
            resume="allow",
            config=dict(settings or {}),
        )
        known.write_text(self._run.id)
        # Steps are logged as a value, because a run that resumes from an earlier checkpoint logs steps again, which W&B refuses.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        self._run.finish()
