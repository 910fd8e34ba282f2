"""Operators of torch.library: the one way in which this package hides kernel launches from torch.compile.

An eager call runs the decorated function itself, without the dispatcher's overhead. Under torch.compile the call becomes one
operator of `torch.ops.hybrid_kernels`, which the compiler does not trace. A function that takes a callable (a collective) or
writes to its arguments cannot be such an operator: `eager_only` breaks the graph around it.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

OptionalTensors = list[torch.Tensor | None]


def constant_result[Function: Callable[..., Any]](fn: Function) -> Function:
    """Decorate a function that torch.compile calls once, when it traces a call, and whose result it takes for a constant.

    torch.compiler.assume_constant_result does the same, and imports TorchDynamo for it, which takes a second.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def eager_only[Function: Callable[..., Any]](fn: Function) -> Function:
    """Decorate a function that torch.compile must not trace. Nothing of the compiler is imported until somebody compiles."""
    reason = "it takes a collective or writes to its arguments"
    disabled: Callable[..., Any] | None = None

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return fn(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(fn, reason=reason)
        return disabled(*args, **kwargs)

    call._torchdynamo_disable, call._torchdynamo_disable_msg = True, reason  # type: ignore[attr-defined]  # breaks a graph here
    return call  # type: ignore[return-value]


def custom_op(
    name: str, fake: Callable[..., Sequence[torch.Tensor | None]]
) -> Callable[[Callable[..., OptionalTensors]], Callable[..., OptionalTensors]]:
    """Decorate a function that launches kernels.

    The function's arguments are annotated tensors, numbers, strings and lists of them, and the first is a tensor. Its results
    share no memory with each other or with an argument. As operators return no None, None becomes an empty tensor inside.

    Args:
        name: of the operator in `torch.ops.hybrid_kernels`.
        fake: returns tensors of the same shapes, strides and dtypes as the function, without a launch (meta implementation).
    """

    def decorate(fn: Callable[..., OptionalTensors]) -> Callable[..., OptionalTensors]:
        operator = torch.library.custom_op(f"hybrid_kernels::{name}", _without_none(fn, fn), mutates_args=())
        operator.register_fake(_without_none(fake, fn))

        @functools.wraps(fn)
        def call(*args: Any) -> OptionalTensors:
            if torch.compiler.is_compiling():
                return [x if x.numel() else None for x in operator(*args)]
            return fn(*args)

        return call

    return decorate


def _without_none(
    fn: Callable[..., Sequence[torch.Tensor | None]], prototype: Callable[..., Any]
) -> Callable[..., list[torch.Tensor]]:
    """Return `fn` with empty tensors for None, and with the signature from which torch.library infers the schema."""

    def results(*args: Any) -> list[torch.Tensor]:
        return [args[0].new_empty(0) if x is None else x for x in fn(*args)]

    signature = inspect.signature(prototype).replace(return_annotation=list[torch.Tensor])
    results.__signature__ = signature  # type: ignore[attr-defined]
    return results
