"""Selective recompute: a cheap function between two linears runs again in the backward pass, and nothing of it is kept but its
input. Not even its output, which the linear behind it saves for its weight's gradient.
"""

from collections.abc import Callable

import torch


class _Recomputed(torch.autograd.Function):
    """run(x) without a graph; the backward pass goes through the graph that `Recompute.again` has made by then."""

    @staticmethod
    def forward(ctx, x, recompute):
        ctx.recompute, recompute.input = recompute, x.detach()
        return recompute.run(x)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.recompute.graph
        ctx.recompute.graph = None
        torch.autograd.backward(y, grad)
        return x.grad, None


class Recompute:
    """One call of `run` whose output's memory is given back until the backward pass asks for it.

    It holds no tensor that has a graph: the graph holds it, and Python does not see cycles through C++, so that a forward pass
    without a backward one would never be freed.
    """

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor]):
        self.run = run
        self.input = self.storage = self.graph = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        output = _Recomputed.apply(x, self)
        self.storage = output.untyped_storage()
        return output

    def release(self, after: torch.Tensor) -> None:
        """Free the output. Its values are back once the gradient of `after`, the next linear's output, is there."""
        self.size = self.storage.nbytes()
        self.storage.resize_(0)
        after.register_hook(self.again)

    def again(self, _) -> None:
        """Run once more, with a graph, and put the values where whoever saved the output will look for them."""
        x = self.input.requires_grad_()
        with torch.enable_grad():
            y = self.run(x)
        self.storage.resize_(self.size)
        # of the storage: autograd's version of the tensor stays
        self.storage.copy_(y.detach().contiguous().untyped_storage())
        self.graph, self.input, self.storage = (x, y), None, None


def between_linears(
    run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, linear: Callable, recompute: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """linear(run(x)), where `linear` returns (output, bias) as megatron-core's do.

    Args:
        run: of one tensor to a new, contiguous one; it must give the same again, and may use parameters.
        linear: saves its input, or a cast of it, for its own backward pass.
        recompute: keep x alone. An x without a gradient has no graph that would run it again: then it is kept as it is.
    """
    if not (recompute and torch.is_grad_enabled() and x.requires_grad):
        return linear(run(x))
    middle = Recompute(run)
    y, bias = linear(middle(x))
    middle.release(after=y)
    return y, bias
