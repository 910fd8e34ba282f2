"""From this rank's parameters and optimizer to the shards it saves, and back.

Everything goes through pieces (model/param_layout.py). What several ranks hold, one of them saves.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.arch.packing import PackedSlice
from megatron_hybrid.checkpoint.format import STATES, boxes_of_range, state_name
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.writer import SavedShard
from megatron_hybrid.model.param_layout import ParamLayout
from megatron_hybrid.precision.fp8_state import Fp8State


@dataclass
class OptimizerShard:
    """Adam's state of a flattened range [start, stop) of a parameter on this rank; `master` is None where the parameter
    itself is fp32."""

    start: int
    stop: int
    states: dict[str, torch.Tensor]
    replicated: bool = False
    """Every data parallel rank holds the same, where others are shared out."""


def full_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter: DeepSpeed's stage 3 leaves an empty one on every rank, and its shape beside it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _elements_before(piece: PackedSlice, shape: tuple[int, ...], flat: int) -> int:
    """How many of the piece's elements come before element `flat` of the flattened parameter of this shape."""
    width = prod(shape[1:])
    row, rest = divmod(flat, width)
    first, rows = piece.target.offset[0], piece.source.shape[0]
    columns_at, columns = (piece.target.offset[1], piece.source.shape[1]) if len(shape) > 1 else (0, 1)
    before = min(max(row - first, 0), rows) * columns
    return before + (min(max(rest - columns_at, 0), columns) if first <= row < first + rows else 0)


def range_of_piece(piece: PackedSlice, shape: tuple[int, ...], start: int, stop: int) -> tuple[int, int]:
    """The part of a flattened range of a parameter that belongs to the piece, as a range of the flattened piece."""
    return _elements_before(piece, shape, start), _elements_before(piece, shape, stop)


def _select(piece: PackedSlice, shape: tuple[int, ...], start: int, flat: torch.Tensor) -> torch.Tensor:
    """The piece's elements of `flat`, which is the parameter's flattened range from `start`; a view where it can be."""
    if len(shape) == 1 or piece.source.shape[1:] == shape[1:]:
        width = prod(shape[1:])
        lo = max(piece.target.offset[0] * width - start, 0)
        hi = max((piece.target.offset[0] + piece.source.shape[0]) * width - start, 0)
        return flat[lo:hi]
    at = torch.arange(start, start + flat.numel(), device=flat.device)
    row, column = at // shape[1], at % shape[1]
    mine = (row >= piece.target.offset[0]) & (row < piece.target.offset[0] + piece.source.shape[0])
    mine &= (column >= piece.target.offset[1]) & (column < piece.target.offset[1] + piece.source.shape[1])
    return flat[mine]


def _as_boxes(shard: SavedShard) -> Iterator[SavedShard]:
    """A flattened range of a box as boxes, which is how a checkpoint holds weights."""
    if shard.range is None:
        yield shard
        return
    start, stop = shard.range
    at = 0
    for row, column, rows, columns in boxes_of_range(start, stop, prod(shard.shape[1:])):
        offset, shape = ((row,), (rows,)) if len(shard.shape) == 1 else ((row, column), (rows, columns))
        data = shard.data[at : at + rows * columns].view(shape)
        offset = tuple(a + b for a, b in zip(shard.offset, offset, strict=True))
        yield replace(shard, offset=offset, shape=shape, data=data, range=None)
        at += rows * columns


class Collector:
    """Walks this rank's part of the model and of the optimizer's state.

    A subclass may say of parameters that their weights come from their masters (`from_master`): then a rank saves as weights those
    of its own masters, rounded, and what it loads are the masters, which `set_parameters` hands to the parameters.

    Args:
        optimizer_shards: parameter -> its OptimizerShard on this rank (train/optimizers/megatron.py); empty: weights only.
        optimizer_sharded: whether the data parallel ranks share that state out, or each has all of it.
    """

    def __init__(
        self,
        chunks,
        layout: ParamLayout,
        groups: ProcessGroupCollection,
        optimizer_shards: dict[torch.nn.Parameter, OptimizerShard],
        optimizer_sharded: bool,
    ):
        self.layout, self.groups = layout, groups
        self.optimizer_shards, self.optimizer_sharded = optimizer_shards, optimizer_sharded
        self.parameters = list(layout.parameters(chunks))
        self.fp8 = Fp8State(chunks)

    def from_master(self, parameter: torch.nn.Parameter) -> bool:
        """Whether a parameter cannot be read and written piece by piece, and its masters stand in for it."""
        return False

    def set_parameters(self) -> None:
        """After masters are loaded: set those parameters to them, on all ranks."""

    def _writes(self, turn: int, name: str, piece: PackedSlice, shared_out: bool) -> tuple[bool, bool]:
        """Whether this rank saves (the weight, the optimizer state) of a piece."""
        dp, tp = self.groups.dp_cp, self.groups.tp  # context parallel ranks hold the same parameters, too
        tied_copy = name == "output_layer.weight" and self.layout.model.tie_embeddings
        mine = not tied_copy and (not piece.replicated or tp.rank() == 0)
        my_turn = turn % dp.size() == dp.rank()
        return mine and my_turn, mine and (shared_out or my_turn)

    def shards(self) -> Iterator[SavedShard]:
        """What this rank saves, as views of live tensors where possible."""
        turn = 0
        for name, parameter, pieces in self.parameters:
            shard = self.optimizer_shards.get(parameter)
            shared_out = self.optimizer_sharded and not (shard and shard.replicated)
            for piece in pieces:
                turn += 1
                weight, state = self._writes(turn, name, piece, shared_out)
                if weight and not self.from_master(parameter):
                    yield SavedShard(
                        piece.tensor.name,
                        piece.tensor.shape,
                        piece.source.offset,
                        piece.source.shape,
                        piece.target.narrow(parameter.detach()),
                    )
                if state and shard:
                    yield from self._state_shards(parameter, piece)
        if self.groups.dp_cp.rank() == self.groups.tp.rank() == 0:
            for name, tensor in self.fp8.tensors().items():
                shape = tuple(tensor.shape)
                yield SavedShard(name, shape, (0,) * len(shape), shape, tensor)

    def _state_shards(self, parameter: torch.nn.Parameter, piece: PackedSlice) -> Iterator[SavedShard]:
        shard, shape = self.optimizer_shards[parameter], full_shape(parameter)
        lo, hi = range_of_piece(piece, shape, shard.start, shard.stop)
        if lo == hi:
            return
        whole = hi - lo == prod(piece.source.shape)
        for state, flat in shard.states.items():
            data = _select(piece, shape, shard.start, flat)
            saved = SavedShard(
                state_name(state, piece.tensor.name),
                piece.tensor.shape,
                piece.source.offset,
                piece.source.shape,
                data.view(piece.source.shape) if whole else data,
                None if whole else (lo, hi),
            )
            if state == "master" and self.from_master(parameter):
                yield from _as_boxes(replace(saved, name=piece.tensor.name, data=saved.data.to(parameter.dtype)))
                if parameter.dtype == torch.float32:  # the weight is its own master
                    continue
            yield saved

    @torch.no_grad()
    def load_weights(self, reader: CheckpointReader) -> None:
        """Fill this rank's parameters; padding stays zero. Those that come from masters wait for them: they are always loaded next."""
        for _, parameter, pieces in self.parameters:
            if self.from_master(parameter):
                continue
            parameter.zero_()
            for piece in pieces:
                piece.target.narrow(parameter).copy_(
                    reader.read(piece.tensor.name, (piece.source.offset, piece.source.shape))
                )

    def load_optimizer(self, reader: CheckpointReader) -> None:
        """Fill this rank's optimizer state: moments and master weights; and the scales of FP8."""
        self._load_states(reader, STATES)
        self.fp8.restore(lambda name: reader.read(name) if name in reader.index.tensors else None)
        self.set_parameters()

    def load_masters(self, reader: CheckpointReader) -> None:
        """Fill the fp32 master weights alone, from the checkpoint's or else from its weights; moments stay as they are."""
        self._load_states(reader, ("master",))
        self.set_parameters()

    @torch.no_grad()
    def _load_states(self, reader: CheckpointReader, wanted: tuple[str, ...]) -> None:
        # only the rows that this rank's range touches are read
        for _, parameter, pieces in self.parameters:
            shard = self.optimizer_shards.get(parameter)
            if shard is None:
                continue
            shape = full_shape(parameter)
            width = prod(shape[1:])
            first, last = shard.start // width, -(-shard.stop // width)
            for state, flat in shard.states.items():
                if state not in wanted:
                    continue
                rows = torch.zeros(last - first, *shape[1:], dtype=flat.dtype)
                for piece in pieces:
                    self._read_rows(reader, piece, state, first, rows)
                begin = shard.start - first * width
                flat.copy_(rows.view(-1)[begin : begin + flat.numel()])

    @staticmethod
    def _read_rows(reader: CheckpointReader, piece: PackedSlice, state: str, first: int, rows: torch.Tensor) -> None:
        """Fill `rows`, the parameter's rows from `first`, with what the piece has there."""
        at, length = piece.target.offset[0], piece.source.shape[0]
        lo, hi = max(at, first), min(at + length, first + len(rows))
        if lo >= hi:
            return
        box = ((piece.source.offset[0] + lo - at, *piece.source.offset[1:]), (hi - lo, *piece.source.shape[1:]))
        has_state = state_name(state, piece.tensor.name) in reader.index.tensors
        source = state if has_state or state != "master" else None  # an fp32 checkpoint's weight is its own master
        data = reader.read(piece.tensor.name, box, state=source)
        target = rows.narrow(0, lo - first, hi - lo)
        for dim in range(1, len(piece.source.shape)):
            target = target.narrow(dim, piece.target.offset[dim], piece.source.shape[dim])
        target.copy_(data)
