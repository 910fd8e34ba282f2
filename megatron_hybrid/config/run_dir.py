"""Check that a run's folder can be created and written, before anything is set up."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from megatron_hybrid.arch.optimizers import OPTIMIZERS
from megatron_hybrid.arch.tensors import model_parameters
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.run import RunConfig

_PROBE_BYTES = 1 << 16


class RunDirError(ConfigError):
    """run_dir cannot be created or written."""

    printed_by: Literal["first rank", "each node", "each rank"] = "each node"


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the size of one checkpoint: weights, fp32 master weights unless the weights are fp32, and optimizer state."""
    optimizer = OPTIMIZERS[config.train.optimizer.kind]
    weight = {"bf16": 2, "fp32": 4}[config.train.dtype]
    return sum(one.numel * optimizer.of(one).checkpoint_bytes(weight) for one in model_parameters(config.model))


def check_run_dir(config: RunConfig, world_size: int = 1) -> None:
    """Check that run_dir is a writable folder or can be created. No files are left behind.

    Args:
        world_size: number of ranks. If the preflight is on, it checks on every node that a checkpoint fits; otherwise this does.

    Raises:
        RunDirError: with the reason.
    """
    path = Path(config.run_dir)
    try:
        folder = _nearest_folder(path)
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryDirectory(prefix=".run-dir-", dir=folder) as probe:
            Path(probe, "file").write_bytes(bytes(_PROBE_BYTES))
    except (OSError, ValueError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise RunDirError(
            ("run_dir", f"{path} cannot be made or written: {reason}; set it to another folder")
        ) from None
    needed = checkpoint_bytes(config)
    if not config.preflight.is_on(world_size) and free < needed:
        raise RunDirError(
            (
                "run_dir",
                f"{path} has {free / 2**20:,.1f} MiB free, and a checkpoint takes {needed / 2**20:,.1f} MiB; make room, or set it "
                "to a folder of another disk",
            )
        )


def _nearest_folder(path: Path) -> Path:
    """Return the folder, or the nearest one above it that exists.

    Raises:
        OSError: what is there is no folder, or may not be entered.
    """
    for there in (path, *path.absolute().parents):
        try:
            os.stat(there)
        except FileNotFoundError:
            if there.is_symlink():
                raise OSError(0, f"{there} is a link to {os.readlink(there)}, which does not exist") from None
            continue
        except NotADirectoryError:
            continue
        if not there.is_dir():
            raise NotADirectoryError(0, f"{there} is a file")
        return there
    raise FileNotFoundError(0, "no folder above it exists")
