"""A run's checkpoints: which there are, which to resume from, which to keep."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid.checkpoint.collect import Collector
from megatron_hybrid.checkpoint.format import INDEX, CheckpointError, Index
from megatron_hybrid.checkpoint.origin import Origin
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.writer import AsyncWrites, SavedShard, finish, write_rank
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.run import CheckpointConfig
from megatron_hybrid.config.tensors import model_tensors

_NAME = re.compile(r"step-(\d{8})")


def checkpoint_step(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None where the name is another."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. Temporary folders do not count: theirs is another name."""
    found = [p for p in root.glob("step-*") if checkpoint_step(p) is not None and (p / INDEX).is_file()]
    return sorted(found, key=lambda p: p.name)


def find_checkpoint(load: str, root: Path) -> Path | None:
    """Where to start from: `auto`, `none`, or a folder (of a checkpoint, or of a run or its checkpoints: the newest).

    Raises:
        CheckpointError: a named folder that is none of these.
    """
    if load == "none":
        return None
    if load == "auto":
        return next(reversed(complete_checkpoints(root)), None)
    folder = Path(load)
    if (folder / INDEX).is_file():
        return folder
    for place in (folder, folder / "checkpoints"):
        if found := complete_checkpoints(place):
            return found[-1]
    raise CheckpointError(
        f"checkpoint.load = {load}: no complete checkpoint there; give a folder with an {INDEX}, auto, or none"
    )


class CheckpointManager:
    """Saves, loads and tidies one run's checkpoints under `root`. Every rank calls the same methods."""

    def __init__(
        self, config: CheckpointConfig, root: Path, collector: Collector, model: dict[str, Any], run: dict[str, Any]
    ):
        self.config, self.root, self.collector = config, root, collector
        self.model, self.run, self.origin = model, run, Origin()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._writes = AsyncWrites()

    def save(self, step: int, state: dict[str, Any], extra: dict[str, torch.Tensor]) -> Path:
        """Save this step. With async_save, returns once everything is copied to host memory.

        Args:
            state: JSON values, the same on every rank. extra: tensors of this rank alone.
        """
        self._writes.wait()
        target = self.root / f"step-{step:08d}"
        folder = self.root / f".saving-{target.name}"
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()
        shards = map(self._on_host, self.collector.shards())
        if self.config.async_save:
            copies = list(shards)
            self._writes.start(lambda: self._write(folder, target, copies, state, extra))
        else:
            self._write(folder, target, shards, state, extra)  # one by one: the host need not hold all of the device's
            dist.barrier()
        return target

    def _on_host(self, shard: SavedShard) -> SavedShard:
        # what the next step changes must be copied now when it is written later
        data = shard.data.detach()
        shard.data = data.clone() if data.device.type == "cpu" and self.config.async_save else data.cpu()
        return shard

    def _write(self, folder: Path, target: Path, shards, state, extra) -> None:
        write_rank(folder, self.rank, shards, extra)
        if self.rank == 0:
            self.origin.write(folder)
            finish(folder, target, Index(self.model, {**self.run, **self.origin.record}, state), self.world_size)
            self._tidy()

    def _tidy(self) -> None:
        """Remove all but the last `keep_last` and every `keep_every`-th."""
        keep_last, keep_every = self.config.keep_last, self.config.keep_every
        if keep_last is None:
            return
        for folder in complete_checkpoints(self.root)[:-keep_last]:
            step = checkpoint_step(folder)
            if not (keep_every and step and step % keep_every == 0):
                shutil.rmtree(folder)

    def load(self, folder: Path, weights_only: bool = False) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
        """Load weights and, unless it is only they that are wanted, the optimizer where the checkpoint has one.

        Returns:
            The run's state, and this rank's own tensors: None where another number of ranks wrote the checkpoint.

        Raises:
            CheckpointError: another model's checkpoint, naming the first field that differs.
        """
        with CheckpointReader(folder) as reader:
            self._check_model(folder, ModelConfig(**reader.index.model))
            self.origin = Origin.of(folder, reader.index.run, with_files=self.rank == 0)
            self.collector.load_weights(reader)
            if weights_only:
                self.collector.load_masters(reader)
                dist.barrier()
                return {}, None
            if reader.has_optimizer():
                self.collector.load_optimizer(reader)
            else:
                self.collector.load_masters(reader)
            state, extra = reader.index.state, None
            if state.get("world_size") == self.world_size:
                extra = reader.local_tensors(self.rank)
        dist.barrier()
        return state, extra

    def _check_model(self, folder: Path, theirs: ModelConfig) -> None:
        """The checkpoint's model has this run's tensors. What has no part in their shapes (rope_theta) may differ."""
        mine = ModelConfig(**self.model)
        if model_tensors(mine) == model_tensors(theirs):
            return
        ours, other = (
            m.model_dump() | {"layer_pattern": "".join(m.layers), "head_dim": m.attention_head_dim}
            for m in (mine, theirs)
        )
        field = next(name for name, value in ours.items() if other[name] != value)
        raise CheckpointError(f"{folder}: model.{field} is {other[field]!r} there and {ours[field]!r} in this run")

    def check(self) -> None:
        """Raise what went wrong in a background save, if anything did."""
        self._writes.check()

    def close(self) -> None:
        """Wait for what is being written."""
        self._writes.wait()
