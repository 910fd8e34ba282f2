"""Backend selection, shared by all ops.

An op lists its backends from fastest to slowest. For a given call, each backend states why it cannot run, or None if it can.
`choose` takes the first backend that can run, or the one that was requested. It never falls back silently.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch

from hybrid_kernels.custom_op import constant_result


@dataclass(frozen=True)
class Choice:
    """Result of a dispatch. `rejected` maps each faster backend to the reason why it cannot run this call."""

    op: str
    backend: str
    reason: str
    rejected: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rejected = "".join(f"; not {name}: {reason}" for name, reason in self.rejected.items())
        return f"{self.op}: {self.backend} ({self.reason}{rejected})"


def choose(op: str, backends: Mapping[str, Callable[[], str | None]], requested: str | None) -> Choice:
    """Choose a backend.

    Args:
        backends: for each backend, fastest first, a function that returns the reason why it cannot run, or None.
        requested: the only backend to consider; None: all of them.

    Raises:
        ValueError: `requested` is not a backend of this op or cannot run this call.
    """
    if requested is not None:
        if requested not in backends:
            raise ValueError(f"{op}: backend={requested!r} does not exist; choose one of {', '.join(backends)}")
        unsupported = backends[requested]()
        if unsupported is not None:
            raise ValueError(f"{op}: backend={requested!r} cannot run here: {unsupported}")
        return Choice(op, requested, "requested")
    rejected: dict[str, str] = {}
    for name, unsupported_reason in backends.items():
        unsupported = unsupported_reason()
        if unsupported is None:
            return Choice(op, name, "the fastest that can run this call", rejected)
        rejected[name] = unsupported
    raise ValueError(f"{op}: no backend can run this call: {rejected}")


@cache
def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@constant_result  # so that torch.compile can trace a dispatch
def has_module(name: str) -> bool:
    """Return whether a Python module can be imported, without importing it."""
    return _is_installed(name)


def triton_interpreted() -> bool:
    """Return whether Triton kernels run in its CPU interpreter (TRITON_INTERPRET=1, set before the first import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_unsupported_reason(*tensors: torch.Tensor | None) -> str | None:
    """Return why Triton kernels cannot run on these tensors, or None."""
    if not has_module("triton"):
        return "the package triton is not installed"
    on_cuda = all(t.is_cuda for t in tensors if t is not None)
    if not on_cuda and not triton_interpreted():
        return "tensors are not on a CUDA device (and TRITON_INTERPRET=1 is not set)"
    dtypes = {t.dtype for t in tensors if t is not None}
    unsupported = dtypes - {torch.bfloat16, torch.float16, torch.float32}
    if unsupported:
        return f"dtype {', '.join(sorted(map(str, unsupported)))} is not supported"
    return None
