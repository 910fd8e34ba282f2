"""Save, load and remove the checkpoints of a run."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.base.errors import UserError, storage_errors
from megatron_hybrid.base.synced_files import sync
from megatron_hybrid.checkpoint.agreement import RankAgreement, StepVotes
from megatron_hybrid.checkpoint.collect import Collector
from megatron_hybrid.checkpoint.folders import check_same_tensors, checkpoint_step, complete_checkpoints
from megatron_hybrid.checkpoint.format import Index
from megatron_hybrid.checkpoint.host_copies import HostCopies
from megatron_hybrid.checkpoint.origin import Origin
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.removal import SAVING, remove_checkpoint, remove_folder
from megatron_hybrid.checkpoint.writer import AsyncWrites, SlicedTensor, finish, write_rank
from megatron_hybrid.config.checkpoint import CheckpointConfig, Take


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
        self._not_removed: set[Path] = set()
        """Old checkpoints that could not be removed, and were reported."""
        self._writes, self._copies = AsyncWrites(), HostCopies()
        self._agreement: RankAgreement | None = None
        self._votes: StepVotes | None = None

    def adopt_own(self, keep: Path | None = None) -> None:
        """Treat all checkpoints under `root` as this run's, which it removes when they are old, except for one to keep."""
        self.own = [folder for folder in complete_checkpoints(self.root) if folder != keep]

    def save(self, step: int, state: dict[str, Any], extra: dict[str, torch.Tensor], removes_old: bool = True) -> Path:
        """Save a step. With `async_save`, return once all tensors are copied to host memory.

        Args:
            state: JSON values, the same on every rank.
            extra: tensors of this rank alone.
            removes_old: False: keep earlier checkpoints, because this one may be of a run that has diverged.

        Raises:
            StorageError, CheckpointError: on all ranks alike, if this save or the one before it in the background failed on any
                rank. Earlier checkpoints are as they were.
        """
        self._wait()
        target = self.root / f"step-{step:08d}"
        folder = self.root / f"{SAVING}{target.name}"
        if self._agreement is None:
            self._agreement, self._votes = RankAgreement(), StepVotes()
        agreement = self._agreement
        agreement.settle(lambda: _new_folder(folder) if self.rank == 0 else None)
        if self.config.async_save:
            copies = self._copies.of(self.collector.shards())
            self._writes.start(lambda: self._write(agreement, folder, target, copies, state, extra, removes_old))
        else:
            # one by one: host memory need not hold all of them
            tensors = map(_on_host, self.collector.shards())
            self._write(agreement, folder, target, tensors, state, extra, removes_old)
        return target

    def _write(
        self,
        agreement: RankAgreement,
        folder: Path,
        target: Path,
        tensors: Iterable[SlicedTensor],
        state: dict[str, Any],
        extra: dict[str, torch.Tensor],
        removes_old: bool,
    ) -> None:
        try:
            agreement.settle(lambda: write_rank(folder, self.rank, tensors, extra))
            agreement.settle(lambda: self._finish(folder, target, state) if self.rank == 0 else None)
            agreement.settle(lambda: self._remove_old() if self.rank == 0 and removes_old else None)
        except UserError:
            # all ranks have stopped writing; what cannot be removed now is removed at the next start
            if self.rank == 0:
                with suppress(OSError):
                    remove_folder(folder)
            raise

    def _finish(self, folder: Path, target: Path, state: dict[str, Any]) -> None:
        with storage_errors(folder):
            kept = self.origin.write(folder)
        index = Index(self.model, {**self.run, **self.origin.record}, state, other_files=kept)
        finish(folder, target, index, self.world_size)
        self.own = [*(other for other in self.own if other != target), target]

    def _remove_old(self) -> None:
        """Remove this run's checkpoints except the last `keep_last` and every `keep_every`-th.

        What cannot be removed is reported once, and tried again after the next save.
        """
        keep_last, keep_every = self.config.keep_last, self.config.keep_every
        if keep_last is None:
            return
        for folder in self.own[:-keep_last]:
            step = checkpoint_step(folder)
            if keep_every and step and step % keep_every == 0:
                continue
            try:
                remove_checkpoint(folder)
                self.own.remove(folder)
            except OSError as error:
                if folder not in self._not_removed:
                    self._not_removed.add(folder)
                    reason = f"{folder.name} cannot be removed: {error.strerror or error}"
                    print(f"{reason}; the run continues and tries again after each save", flush=True)

    def load(self, folder: Path, take: Take = "everything") -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
        """Load the weights and, unless `take` is weights, the optimizer state if the checkpoint has one.

        Hashes are not compared; `choose_verified_start` (train/verified_start.py) has done so.

        Returns:
            The part of the run's state that is taken. This rank's own tensors; None unless everything is taken from a checkpoint
            of the same number of ranks.

        Raises:
            CheckpointError: the checkpoint is of another model; names the first field that differs.
        """
        with CheckpointReader(folder, verify="sizes") as reader:
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
        """Raise the error of a background save that failed, on all ranks after the same step. Every rank calls it once per step.

        Raises:
            StorageError, CheckpointError: as `save`.
        """
        if self._writes.in_progress and self._votes is not None and self._votes.unanimous(self._writes.ended):
            self._wait()

    @property
    def in_progress(self) -> bool:
        """True while a checkpoint is written in the background, until `check` has seen its end."""
        return self._writes.in_progress

    def _wait(self) -> None:
        """Wait for the write in progress, on all ranks alike."""
        if self._votes is not None:
            self._votes.drain()
        self._writes.wait()

    def close(self) -> None:
        """Wait for the write in progress. Also called after an error, when other ranks may have stopped."""
        self._writes.wait()


def _on_host(tensor: SlicedTensor) -> SlicedTensor:
    tensor.data = tensor.data.detach().cpu()
    return tensor


def _new_folder(folder: Path) -> None:
    """Create an empty folder, and the folders above it."""
    with storage_errors(folder):
        remove_folder(folder)
        is_first = not folder.parent.exists()
        folder.mkdir(parents=True)
        if is_first:
            sync(folder.parent.parent)
