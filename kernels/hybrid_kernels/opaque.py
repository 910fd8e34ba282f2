"""Launches that torch.compile takes as one operator each, without looking into them."""

import functools
from collections.abc import Callable

import torch


def opaque(name: str, fake: Callable) -> Callable:
    """Decorator: the function itself in eager mode, `torch.ops.hybrid_kernels.<name>` where torch.compile traces.

    Args:
        name: of the operator. The function takes tensors, numbers and lists of them, annotated, and returns a list of
            tensors, none of which shares memory with another or with an argument.
        fake: from the same arguments to tensors of the same shapes, strides and dtypes, without a launch.
    """

    def decorate(fn: Callable) -> Callable:
        operator = torch.library.custom_op(f"hybrid_kernels::{name}", fn, mutates_args=())
        operator.register_fake(fake)

        @functools.wraps(fn)
        def call(*args):
            return operator(*args) if torch.compiler.is_compiling() else fn(*args)

        return call

    return decorate
