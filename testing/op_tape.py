"""A stand-in for CUDA graphs on the CPU: it records torch's operations with their tensors, and runs these again, without Python.

As in a CUDA graph, operations keep the addresses of their operands, what the recorded Python code did besides is not repeated, and
reading a value on the host while recording is an error.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._C import _distributed_c10d as c10d
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
HOST_READS = {
    *(aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.bincount),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave),
}
"""Operations whose result, or its shape, is known to the host only when the device has computed it."""
READERS = ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__", "__array__")
CONSTANTS = ("pipeline_parallel/schedules.py", "tensor_parallel/layers.py")
"""Files of megatron-core that make a tensor from a Python number: a scalar on the host, which a kernel takes as an argument."""


RANDOM_STATE = ("tensor_parallel/random.py",)
"""Files of megatron-core that read the state of the host's generator."""
MAKES_NO_VALUES = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.set_}


class HostReadError(AssertionError):
    """Recorded code reads a value on the host, or copies one from it."""


class OpTape(TorchDispatchMode):
    """Records operations. What they write to tensors from before is taken back by `undo`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list]] = []
        self.own: dict[int, torch.Tensor] = {}
        """A tensor of each memory that was allocated while recording."""
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        """Other memory that was written, and a copy of what it held."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self._check(func, args)
        for x in _written(func, args, kwargs):
            at = x.untyped_storage().data_ptr()
            if at not in self.own and at not in self.before:
                self.before[at] = x.untyped_storage(), x.untyped_storage().clone()
        result = func(*args, **kwargs)
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        if any(not alias.is_write for alias in aliases):
            return result  # a view has the memory of its operand, whatever is written there
        new = [] if aliases else [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.own |= {x.untyped_storage().data_ptr(): x for x in new}
        if func.overloadpacket not in MAKES_NO_VALUES:
            self.calls.append((func, args, kwargs, new))
        return _waited(result)

    def undo(self) -> None:
        """Leave memory from before as it was, and spoil the results: a capture computes nothing."""
        for storage, copy in self.before.values():
            storage.copy_(copy)
        for x in self.own.values():
            if x.is_floating_point():
                x.detach().fill_(float("nan"))

    def _check(self, func: Any, args: tuple) -> None:
        if func.overloadpacket in HOST_READS and not _caller().endswith(RANDOM_STATE):
            raise HostReadError(f"{func} reads the device")
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            by_mask = any(x is not None and x.dtype == torch.bool for x in args[1])
            filled = len(args) > 2 and args[2].numel() == 1  # torch then calls masked_fill
            if by_mask and not filled:
                raise HostReadError(f"{func} by a mask reads the number of its entries")
        if func.overloadpacket is aten.lift_fresh and not _caller().endswith(CONSTANTS):
            raise HostReadError(f"{_caller()} copies a value from the host")

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, kept in self.calls:
            result = _waited(func(*args, **kwargs))
            made = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
            for old, new in zip(kept, made):  # noqa: B905 - none are kept where an operand was written
                old.copy_(new)


class TapeRecorder:
    """A `Recorder` (train/cuda_graph.py) that records on tapes.

    Attributes:
        replays: number of replays so far.
        released: whether the tapes were released.
    """

    def __init__(self) -> None:
        self.replays, self.tapes, self.released = 0, list[OpTape](), False

    def side_stream(self) -> Any:
        return nullcontext()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record a function. Its operations change nothing until they are replayed."""
        tape = OpTape()
        with ExitStack() as stack:
            for name in READERS:
                stack.enter_context(mock.patch.object(torch.Tensor, name, _refuse(name)))
            # the memory of tensors that recompute releases stays theirs
            stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", lambda storage, size: storage))
            with tape:
                function()
        tape.undo()
        self.tapes.append(tape)

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay

    def release(self) -> None:
        self.released = True


def _written(func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Return the operands that an operation writes to. Schemas of collectives do not say so."""
    collective = func.namespace == "c10d"
    named = zip(func._schema.arguments, args)  # noqa: B905 - the rest are defaults or keywords
    pairs = [*named, *((one, kwargs[one.name]) for one in func._schema.arguments if one.name in kwargs)]
    values = [x for one, x in pairs if collective or (one.alias_info is not None and one.alias_info.is_write)]
    return [x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]


def _waited(result: Any) -> Any:
    """Wait for the collective that returned this result, if it was one: gloo's reduce-scatter writes its output then."""

    def wait(x: Any) -> Any:
        if not isinstance(x, torch.ScriptObject):
            return x
        c10d.Work.unbox(x).wait()
        return c10d.FakeWork().boxed()  # waiting again would write again

    return pytree.tree_map(wait, result)


def _refuse(name: str) -> Callable[..., Any]:
    read = getattr(torch.Tensor, name)

    def refuse(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        if _caller().endswith(RANDOM_STATE):
            return read(self, *args, **options)
        raise HostReadError(f"Tensor.{name} reads the device")

    return refuse


def _caller() -> str:
    """Return the file that called torch."""
    frame = sys._getframe(1)
    torch_folder, here = str(Path(torch.__file__).parent), __file__
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith(torch_folder) and name != here and "cpu_backend" not in name:
            return name
        frame = frame.f_back
    return ""
