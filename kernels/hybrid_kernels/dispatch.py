"""How every op here picks its backend: once, explainably, and never falling back in silence.

An op lists its backends from the fastest to the plainest. Each says, for a given call, what it lacks
(`None` when it can run). `choose` takes the first that lacks nothing, or exactly the one that was asked for.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch


@dataclass(frozen=True)
class Choice:
    """What a dispatch decided. `rejected` maps every faster backend to what it lacks for this call."""

    op: str
    backend: str
    reason: str
    rejected: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        why_not = "".join(f"; not {name}: {lack}" for name, lack in self.rejected.items())
        return f"{self.op}: {self.backend} ({self.reason}{why_not})"


def choose(op: str, backends: Mapping[str, Callable[[], str | None]], requested: str | None) -> Choice:
    """Choose among `backends` (name -> function that says what is missing, or None), fastest first.

    Raises:
        ValueError: `requested` is not a backend of this op, or cannot run this call (the message says why).
    """
    if requested is not None:
        if requested not in backends:
            raise ValueError(f"{op}: backend={requested!r} does not exist; choose one of {', '.join(backends)}")
        lack = backends[requested]()
        if lack is not None:
            raise ValueError(f"{op}: backend={requested!r} cannot run here: {lack}")
        return Choice(op, requested, "asked for")
    rejected: dict[str, str] = {}
    for name, missing in backends.items():
        lack = missing()
        if lack is None:
            return Choice(op, name, "the fastest that can run this call", rejected)
        rejected[name] = lack
    raise ValueError(f"{op}: no backend can run this call: {rejected}")


@cache
def _find(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@torch.compiler.assume_constant_result  # so that torch.compile sees through a dispatch
def has_module(name: str) -> bool:
    """Whether a Python module can be imported, without importing it."""
    return _find(name)


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its CPU interpreter (TRITON_INTERPRET=1, set before the first import)."""
    import os

    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def missing_for_triton(*tensors: torch.Tensor | None) -> str | None:
    """What a Triton kernel lacks to run on these tensors."""
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
