"""Reading true tensors, whole or any box of them, whatever layout wrote them."""

from collections import defaultdict
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_hybrid.arch.optimizers.spec import MASTER
from megatron_hybrid.checkpoint.format import CheckpointError, Shard, read_index, state_name

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, shape)"""


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes of one tensor share; None: nothing."""
    start = tuple(max(x, y) for x, y in zip(a[0], b[0], strict=True))
    stop = tuple(min(x + n, y + m) for x, n, y, m in zip(*a, *b, strict=True))
    shape = tuple(hi - lo for lo, hi in zip(start, stop, strict=True))
    return (start, shape) if all(n > 0 for n in shape) else None


def _within(box: Box, origin: tuple[int, ...]) -> tuple[slice, ...]:
    """The box as slices of a tensor that begins at `origin`."""
    return tuple(slice(o - at, o - at + n) for o, n, at in zip(*box, origin, strict=True))


class CheckpointReader:
    """An open checkpoint. Reads only the bytes it needs; close it, or use it in a `with`."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self._files: dict = {}

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._files.clear()

    def has_optimizer(self) -> bool:
        master = state_name(MASTER, "")
        return any(name.startswith("optimizer.") and not name.startswith(master) for name in self.index.tensors)

    def _entry(self, shard: Shard):
        if shard.file not in self._files:
            self._files[shard.file] = safe_open(self.folder / shard.file, framework="pt")
        return self._files[shard.file].get_slice(shard.entry)

    def local_tensors(self, rank: int) -> dict[str, torch.Tensor]:
        """What rank `rank` alone saved: its random state."""
        with safe_open(self.folder / f"rank-{rank:05d}.safetensors", framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("local.")]  # noqa: SIM118 - it is no dict
            return {name.removeprefix("local."): file.get_tensor(name) for name in names}

    def read(self, name: str, box: Box | None = None, state: str | None = None) -> torch.Tensor:
        """A box of a tensor, or of an optimizer state of it, in the dtype it was saved in, on the CPU.

        Raises:
            CheckpointError: no such tensor, or its shards do not cover the box.
        """
        name = state_name(state, name) if state else name
        entry = self.index.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.folder}: it has no tensor {name}")
        box = box or ((0,) * len(entry.shape), entry.shape)
        if overlap(box, ((0,) * len(entry.shape), entry.shape)) != box:
            raise CheckpointError(f"{self.folder}: {name} is {entry.shape}; nothing lies at {box[0]} of shape {box[1]}")

        result, covered = None, 0
        whole_boxes, ranges = [], defaultdict(list)
        for shard in entry.shards:
            if shard.range is None:
                whole_boxes.append(shard)
            else:
                ranges[shard.offset, shard.shape].append(shard)
        for shard in whole_boxes:
            part = overlap(box, (shard.offset, shard.shape))
            if part:
                data = self._entry(shard)[_within(part, shard.offset)]
                result = result if result is not None else data.new_empty(box[1])
                result[_within(part, box[0])] = data
                covered += prod(part[1])
        for source, shards in ranges.items():
            part = overlap(box, source)
            if part:
                data, count = self._read_ranges(source, part, shards)
                result = result if result is not None else data.new_empty(box[1])
                result[_within(part, box[0])] = data
                covered += count
        if covered != prod(box[1]) or result is None:
            raise CheckpointError(
                f"{self.folder}: {name} has {covered} of the {prod(box[1])} values at {box[0]} of shape {box[1]}"
            )
        return result

    def _read_ranges(self, source: Box, part: Box, shards: list[Shard]) -> tuple[torch.Tensor, int]:
        """`part` of the box `source`, whose rows are flattened and split over shards: (data, values found)."""
        (row0, *_), (rows, *_) = part
        width = prod(source[1][1:])
        first = (row0 - source[0][0]) * width
        last = first + rows * width
        buffer, found = None, 0
        for shard in shards:
            lo, hi = max(first, shard.range[0]), min(last, shard.range[1])
            if lo < hi:
                data = self._entry(shard)[lo - shard.range[0] : hi - shard.range[0]]
                buffer = buffer if buffer is not None else data.new_empty(last - first)
                buffer[lo - first : hi - first] = data
                found += hi - lo
        if buffer is None or found != last - first:
            return torch.empty(part[1]), 0
        columns = _within(part, source[0])[1:]
        return buffer.view(rows, *source[1][1:])[(slice(None), *columns)], prod(part[1])
