"""`torch.compile` at a function's first call, not at its definition.

megatron-core and emerging-optimizers decorate some forty functions with `torch.compile`. That alone imports TorchInductor's
compiler, which takes a fifth of the CPU time in which a rank starts. A run calls few of these functions, or none.

Commands call `defer_compilation` before they import megatron-core.
"""

import functools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

_compile: Callable[..., Any] = torch.compile
_never = False


def defer_compilation() -> None:
    """Replace `torch.compile` in this process: it compiles plain functions when they are first called."""
    torch.compile = _deferred


def disable_compilation() -> None:
    """Run what `torch.compile` has decorated, or will, as it stands."""
    global _never
    _never = True
    defer_compilation()
    if "torch._dynamo" in sys.modules:  # for what was decorated before
        torch.compiler.set_stance("force_eager")


def _deferred(model: Any = None, **options: Any) -> Any:
    """Take the arguments of `torch.compile`, and return what it returns."""
    if model is None:
        return functools.partial(_deferred, **options)
    if not isinstance(model, FunctionType):
        return model if _never else _compile(model, **options)
    compiled: Callable[..., Any] | None = None

    @functools.wraps(model)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if _never or torch.compiler.is_compiling():  # by a function around this one
            return model(*args, **kwargs)
        if compiled is None:
            compiled = _compile(model, **options)
        return compiled(*args, **kwargs)

    return call
