"""Selective recompute of a cheap function between two linears.

The function runs again in the backward pass, so that only its input is kept. Its output, which the linear behind it saves for its
weight's gradient, is not kept either.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Function = Callable[[torch.Tensor], torch.Tensor]
Linear = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


class _Recomputed(torch.autograd.Function):
    """run(x) without a graph. The backward pass uses the graph that `Recompute.again` has built by then."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, recompute: "Recompute") -> torch.Tensor:
        ctx.recompute, recompute.input = recompute, x.detach()
        return recompute.run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        x, y = ctx.recompute.graph
        ctx.recompute.graph = None
        torch.autograd.backward(y, grad)
        return x.grad, None


class Recompute:
    """One call of `run` whose output's memory is released until the backward pass needs it.

    It holds no tensor that has a graph: the graph holds it, and Python does not see cycles through C++, so a forward pass without
    a backward pass would never be freed.
    """

    def __init__(self, run: Function) -> None:
        self.run = run
        self.input: torch.Tensor | None = None
        self.storage: torch.UntypedStorage | None = None
        self.graph: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _Recomputed.apply(x, self)
        self.storage = output.untyped_storage()
        return output

    def release(self, after: torch.Tensor) -> None:
        """Free the output. Its values return before the gradient of `after`, the next linear's output, is used."""
        assert self.storage is not None
        self.size = self.storage.nbytes()
        self.storage.resize_(0)
        after.register_hook(self.again)

    def again(self, _: torch.Tensor) -> None:
        """Run again, with a graph, and restore the values in the storage that the next linear has saved."""
        assert self.input is not None and self.storage is not None
        x = self.input.requires_grad_()
        with torch.enable_grad():
            y = self.run(x)
        self.storage.resize_(self.size)
        # copying the storage leaves autograd's version of the tensor as it is
        self.storage.copy_(y.detach().contiguous().untyped_storage())
        self.graph, self.input, self.storage = (x, y), None, None


def between_linears(
    run: Function, x: torch.Tensor, linear: Linear, recompute: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return linear(run(x)).

    Args:
        run: makes a new, contiguous tensor of one tensor, the same each time. It may use parameters.
        linear: returns (output, bias), as megatron-core's do. It saves its input, or a cast of it, for its backward pass.
        recompute: keep x only. An x without a gradient has no graph in which `run` could run again, so nothing is released.
    """
    if not (recompute and torch.is_grad_enabled() and x.requires_grad):
        return linear(run(x))
    middle = Recompute(run)
    y, bias = linear(middle(x))
    middle.release(after=y)
    return y, bias
