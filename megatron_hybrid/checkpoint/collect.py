"""Conversion between this rank's parameters and optimizer state, and slices of true tensors to save or to load.

Parameters are mapped to true tensors by their slices (model/param_layout.py). If several ranks hold the same values, one of
them saves them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.arch.optimizers.spec import MASTER
from megatron_hybrid.arch.packing import PackedSlice
from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.base.heartbeat import heartbeat
from megatron_hybrid.checkpoint.format import slices_of_range, state_name
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.checkpoint.writer import SlicedTensor
from megatron_hybrid.model.param_layout import ParamLayout
from megatron_hybrid.precision.fp8_state import Fp8State


@dataclass
class OptimizerShard:
    """Optimizer state of the flattened range [start, stop) of a parameter on this rank. An fp32 parameter has no `master`."""

    start: int
    stop: int
    states: dict[str, torch.Tensor]
    replicated: bool = False
    """All data parallel ranks hold the same state, while that of other parameters is sharded."""


class TensorReader(Protocol):
    """Source of a model's weights: a checkpoint, or a folder of another format."""

    def read(self, name: str, wanted: TensorSlice | None = None) -> torch.Tensor:
        """Return a slice of a true tensor; None: all of it."""
        ...


def full_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter. DeepSpeed's stage 3 empties parameters and keeps their shape in `ds_shape`."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _elements_before(part: TensorSlice, shape: tuple[int, ...], flat: int) -> int:
    """Return how many elements of the slice come before element `flat` of the flattened parameter of this shape."""
    row, rest = divmod(flat, prod(shape[1:]))
    first, rows = part.offset[0], part.shape[0]
    first_column, columns = (part.offset[1], part.shape[1]) if len(shape) > 1 else (0, 1)
    before = min(max(row - first, 0), rows) * columns
    return before + (min(max(rest - first_column, 0), columns) if first <= row < first + rows else 0)


def range_of_slice(part: TensorSlice, shape: tuple[int, ...], start: int, stop: int) -> tuple[int, int]:
    """Return the elements of a parameter's flattened range that are in the slice, as a range of the flattened slice."""
    return _elements_before(part, shape, start), _elements_before(part, shape, stop)


def select_from_range(part: TensorSlice, shape: tuple[int, ...], start: int, flat: torch.Tensor) -> torch.Tensor:
    """Return the elements of the slice in `flat`, a parameter's flattened range from `start`; a view if they are adjacent."""
    if len(shape) == 1 or part.shape[1:] == shape[1:]:
        width = prod(shape[1:])
        return flat[max(part.offset[0] * width - start, 0) : max(part.end[0] * width - start, 0)]
    at = torch.arange(start, start + flat.numel(), device=flat.device)
    row, column = at // shape[1], at % shape[1]
    inside = (row >= part.offset[0]) & (row < part.end[0])
    inside &= (column >= part.offset[1]) & (column < part.end[1])
    return flat[inside]


def _without_range(tensor: SlicedTensor) -> Iterator[SlicedTensor]:
    """Split a flattened range into slices, because a checkpoint holds weights in slices."""
    if tensor.range is None:
        yield tensor
        return
    at = 0
    for part in slices_of_range(*tensor.range, tensor.slice.shape):
        data = tensor.data[at : at + part.numel].view(part.shape)
        offset = tuple(a + b for a, b in zip(tensor.slice.offset, part.offset, strict=True))
        yield replace(tensor, slice=TensorSlice(offset, part.shape), data=data, range=None)
        at += part.numel


class Collector:
    """Iterates over this rank's part of the model and of the optimizer state, to save it or to load it.

    A subclass may derive the weights of some parameters from their fp32 masters (`from_master`). Their saved weights are then
    rounded masters, and loading fills the masters, which `set_parameters` copies to the parameters.

    Args:
        optimizer_shards: this rank's optimizer state by parameter (train/optimizers/megatron.py); empty: weights only.
        optimizer_sharded: whether the optimizer state is sharded over the data parallel ranks, or replicated.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        layout: ParamLayout,
        groups: ProcessGroupCollection,
        optimizer_shards: dict[torch.nn.Parameter, OptimizerShard],
        optimizer_sharded: bool,
    ) -> None:
        self.layout, self.groups = layout, groups
        self.optimizer_shards, self.optimizer_sharded = optimizer_shards, optimizer_sharded
        self.parameters = list(layout.parameters(chunks))
        self.fp8 = Fp8State(list(chunks))

    def from_master(self, parameter: torch.nn.Parameter) -> bool:
        """Return whether a parameter's weights are saved and loaded through its master."""
        return False

    def set_parameters(self) -> None:
        """Copy loaded masters to the parameters of `from_master`, on all ranks."""

    def _writes(self, turn: int, name: str, part: PackedSlice, sharded: bool) -> tuple[bool, bool]:
        """Return whether this rank saves the slice's weight, and whether it saves its optimizer state."""
        dp, tp = self.groups.dp_cp, self.groups.tp  # context parallel ranks hold the same parameters, too
        tied_copy = name == "output_layer.weight" and self.layout.model.tie_embeddings
        mine = not tied_copy and (not part.replicated or tp.rank() == 0)
        my_turn = turn % dp.size() == dp.rank()
        return mine and my_turn, mine and (sharded or my_turn)

    def shards(self) -> Iterator[SlicedTensor]:
        """Yield what this rank saves, as views of live tensors where possible."""
        turn = 0
        for name, parameter, slices in self.parameters:
            shard = self.optimizer_shards.get(parameter)
            sharded = self.optimizer_sharded and not (shard and shard.replicated)
            for part in slices:
                turn += 1
                weight, state = self._writes(turn, name, part, sharded)
                if weight and not self.from_master(parameter):
                    data = part.target.narrow(parameter.detach())
                    yield SlicedTensor(part.tensor.name, part.tensor.shape, part.source, data)
                if state and shard:
                    yield from self._states(parameter, part)
        if self.groups.dp_cp.rank() == self.groups.tp.rank() == 0:
            for name, tensor in self.fp8.tensors().items():
                shape = tuple(tensor.shape)
                yield SlicedTensor(name, shape, TensorSlice.whole(shape), tensor)

    def _states(self, parameter: torch.nn.Parameter, part: PackedSlice) -> Iterator[SlicedTensor]:
        """Yield the optimizer state of a slice, and its weight if that comes from the master."""
        shard, shape, local = self.optimizer_shards[parameter], full_shape(parameter), part.target
        start, stop = range_of_slice(local, shape, shard.start, shard.stop)
        if start == stop:
            return
        whole = stop - start == local.numel
        for state, flat in shard.states.items():
            data = select_from_range(local, shape, shard.start, flat)
            saved = SlicedTensor(
                state_name(state, part.tensor.name),
                part.tensor.shape,
                part.source,
                data.view(part.source.shape) if whole else data,
                None if whole else (start, stop),
            )
            if state == MASTER and self.from_master(parameter):
                yield from _without_range(replace(saved, name=part.tensor.name, data=saved.data.to(parameter.dtype)))
                if parameter.dtype == torch.float32:  # the weight is its own master
                    continue
            yield saved

    @torch.no_grad()
    def load_weights(self, reader: TensorReader) -> None:
        """Fill this rank's parameters; padding is zero. Parameters of `from_master` are filled by the next load of masters."""
        for _, parameter, slices in self.parameters:
            heartbeat.beat()
            if self.from_master(parameter):
                continue
            parameter.zero_()
            for part in slices:
                part.target.narrow(parameter.data).copy_(reader.read(part.tensor.name, part.source))

    def load_optimizer(self, reader: CheckpointReader) -> None:
        """Fill this rank's optimizer state (moments and master weights) and the scales of FP8."""
        self._load_states(reader)
        self.fp8.restore(lambda name: reader.read(name) if name in reader.index.tensors else None)
        self.set_parameters()

    def load_masters(self, reader: CheckpointReader) -> None:
        """Fill the fp32 master weights from the checkpoint's masters, or else from its weights. Moments are not changed."""
        self._load_states(reader, (MASTER,))
        self.set_parameters()

    @torch.no_grad()
    def _load_states(self, reader: CheckpointReader, wanted: tuple[str, ...] | None = None) -> None:
        # only the rows that this rank's range touches are read
        for _, parameter, slices in self.parameters:
            heartbeat.beat()
            shard = self.optimizer_shards.get(parameter)
            if shard is None:
                continue
            shape = full_shape(parameter)
            width = prod(shape[1:])
            first, last = shard.start // width, -(-shard.stop // width)
            for state, flat in shard.states.items():
                if wanted is not None and state not in wanted:
                    continue
                rows = torch.zeros(last - first, *shape[1:], dtype=flat.dtype)
                for part in slices:
                    self._read_rows(reader, part, state, first, rows)
                begin = shard.start - first * width
                flat.copy_(rows.view(-1)[begin : begin + flat.numel()])

    @staticmethod
    def _read_rows(reader: CheckpointReader, part: PackedSlice, state: str, first: int, rows: torch.Tensor) -> None:
        """Fill `rows`, which are the parameter's rows from `first`, with the slice's values in these rows."""
        local = part.target
        held = TensorSlice((first, *local.offset[1:]), (len(rows), *local.shape[1:]))
        if (shared := local.intersection(held)) is None:
            return
        inner = shared.relative_to(local.offset)
        wanted = TensorSlice(tuple(a + b for a, b in zip(part.source.offset, inner.offset, strict=True)), inner.shape)
        has_state = state_name(state, part.tensor.name) in reader.index.tensors
        source = state if has_state or state != MASTER else None  # an fp32 checkpoint's weight is its own master
        data = reader.read(part.tensor.name, wanted, state=source)
        shared.relative_to((first, *(0,) * (len(shared.offset) - 1))).narrow(rows).copy_(data)
