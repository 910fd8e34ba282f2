"""Save, load and remove the checkpoints of a run."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.checkpoint.collect import Collector
from megatron_hybrid.checkpoint.folders import DELETING, SAVING, check_same_tensors, checkpoint_step
from megatron_hybrid.checkpoint.format import Index
from megatron_hybrid.checkpoint.origin import Origin
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.writer import AsyncWrites, SlicedTensor, finish, write_rank
from megatron_hybrid.config.checkpoint import CheckpointConfig, Take


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, because one that is half removed must not look complete."""
    doomed = folder.with_name(DELETING + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def remove_remains(root: Path) -> list[str]:
    """Remove what interrupted saves and removals left behind, and return the names. The run's lock must be held."""
    remains = [path for prefix in (SAVING, DELETING) for path in root.glob(f"{prefix}step-*")]
    for path in remains:
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path)
    return sorted(path.name for path in remains)


def _state_to_take(state: dict[str, Any], take: Take) -> dict[str, Any]:
    """Return the part of a run's state that goes with the tensors that are taken."""
    if take == "everything":
        return state
    return {"updates": state["updates"]} if take == "moments" else {}


class CheckpointManager:
    """Saves, loads and removes the checkpoints of a run under `root`. Every rank calls the same methods.

    Only checkpoints of this run are removed: those in `own`, which includes those that it saves.
    """

    def __init__(
        self, config: CheckpointConfig, root: Path, collector: Collector, model: dict[str, Any], run: dict[str, Any]
    ) -> None:
        self.config, self.root, self.collector = config, root, collector
        self.model, self.run, self.origin = model, run, Origin()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.own: list[Path] = []
        """Checkpoints of this run, oldest first."""
        self._writes = AsyncWrites()

    def save(self, step: int, state: dict[str, Any], extra: dict[str, torch.Tensor]) -> Path:
        """Save a step. With `async_save`, return once all tensors are copied to host memory.

        Args:
            state: JSON values, the same on every rank.
            extra: tensors of this rank alone.
        """
        self._writes.wait()
        target = self.root / f"step-{step:08d}"
        folder = self.root / f"{SAVING}{target.name}"
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()
        tensors = map(self._on_host, self.collector.shards())
        if self.config.async_save:
            copies = list(tensors)
            self._writes.start(lambda: self._write(folder, target, copies, state, extra))
        else:
            self._write(folder, target, tensors, state, extra)  # one by one: host memory need not hold all of them
            dist.barrier()
        return target

    def _on_host(self, tensor: SlicedTensor) -> SlicedTensor:
        # a background write needs a copy, because the next step changes the tensor
        data = tensor.data.detach()
        tensor.data = data.clone() if data.device.type == "cpu" and self.config.async_save else data.cpu()
        return tensor

    def _write(
        self,
        folder: Path,
        target: Path,
        tensors: Iterable[SlicedTensor],
        state: dict[str, Any],
        extra: dict[str, torch.Tensor],
    ) -> None:
        write_rank(folder, self.rank, tensors, extra)
        if self.rank == 0:
            self.origin.write(folder)
            finish(folder, target, Index(self.model, {**self.run, **self.origin.record}, state), self.world_size)
            self.own = [*(other for other in self.own if other != target), target]
            self._remove_old()

    def _remove_old(self) -> None:
        """Remove this run's checkpoints except the last `keep_last` and every `keep_every`-th."""
        keep_last, keep_every = self.config.keep_last, self.config.keep_every
        if keep_last is None:
            return
        for folder in self.own[:-keep_last]:
            step = checkpoint_step(folder)
            if not (keep_every and step and step % keep_every == 0):
                self.own.remove(folder)
                if folder.is_dir():
                    remove_checkpoint(folder)

    def load(self, folder: Path, take: Take = "everything") -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
        """Load the weights and, unless `take` is weights, the optimizer state if the checkpoint has one.

        Returns:
            The part of the run's state that is taken. This rank's own tensors; None unless everything is taken from a checkpoint
            of the same number of ranks.

        Raises:
            CheckpointError: the checkpoint is of another model; names the first field that differs.
        """
        with CheckpointReader(folder) as reader:
            check_same_tensors(folder, reader.model, ModelConfig(**self.model))
            self.origin = Origin.of(folder, reader.index.run, with_files=self.rank == 0)
            self.collector.load_weights(reader)
            if take != "weights" and reader.has_optimizer():
                self.collector.load_optimizer(reader)
            else:
                self.collector.load_masters(reader)
            state, extra = _state_to_take(reader.index.state, take), None
            if state.get("world_size") == self.world_size:
                extra = reader.local_tensors(self.rank)
        dist.barrier()
        return state, extra

    def check(self) -> None:
        """Raise the error of a background save that failed."""
        self._writes.check()

    def close(self) -> None:
        """Wait for the write in progress."""
        self._writes.wait()
