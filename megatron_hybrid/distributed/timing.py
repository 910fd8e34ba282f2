"""Time operations on this process's device. A measurement is a point: a dictionary of sizes and seconds."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_hybrid.distributed.device import has_cuda

Point = dict[str, Any]
"""`op`, `pass` (forward, backward, or none), sizes, and the median `seconds` of one call."""


def seconds_of(call: Callable[[], object], samples: int = 8) -> float:
    """Return the median seconds of one call. On a GPU, calls are queued behind a sleep kernel, so that launches are not timed."""
    call()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    if not has_cuda():
        times = []
        for _ in range(samples):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return sorted(times)[samples // 2]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(0.05, 1.5 * host * samples) * 2e9))  # clock cycles
    for mark in marks[:-1]:
        mark.record()
        call()
    marks[-1].record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) * 1e-3 for a, b in zip(marks, marks[1:]))
    return times[samples // 2]


def both_passes(sizes: Point, forward: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor]) -> Iterator[Point]:
    """Yield the points of the forward and backward pass of a differentiable call.

    The backward pass takes the time of both passes minus that of the forward pass.

    Args:
        inputs: leaves whose gradients the backward pass computes. They are returned, not added to `.grad`: in training the gradients
            of activations are not accumulated either, and adding them would take as long as some of the operations. A weight whose
            gradient the call itself adds to `main_grad`, as Transformer Engine's linears do, gets none.
    """

    def forward_backward() -> tuple[torch.Tensor | None, ...]:
        y = forward()
        return torch.autograd.grad(y, inputs, y.detach(), allow_unused=True)

    for one, gradient in zip(inputs, forward_backward(), strict=True):
        assert gradient is not None or hasattr(one, "main_grad"), "an input has no gradient"
    alone, both = seconds_of(forward), seconds_of(forward_backward)
    yield {**sizes, "pass": "forward", "seconds": alone}
    yield {**sizes, "pass": "backward", "seconds": max(both - alone, 0.0)}


class Join(torch.autograd.Function):
    """Cheapest consumer of several outputs: a scalar whose gradient for each output is the output itself."""

    @staticmethod
    def forward(ctx: Any, *outputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*outputs)
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:
        return ctx.saved_tensors
