"""Time operations on this process's device. A measurement is a point: a dictionary of sizes and seconds.

A GPU lowers its clocks under a load that exceeds its power limit, as training does: an H200 runs GEMMs at 800 TFLOP/s for a moment
and at 670 later. So a GPU is under load before each measurement.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch

from megatron_hybrid.distributed.device import has_cuda, local_device

Point = dict[str, Any]
"""`op`, `pass` (forward, backward, or none), sizes, and the median `seconds` of one call."""
Outputs = torch.Tensor | tuple[torch.Tensor, ...]
LOAD_SECONDS = 1.5
"""Time under load after which an H200's clocks are steady: after half a second they are too low, after one too high."""
LOAD_SIZE = 8192
"""Rows and columns of the load's matrices."""


@cache
def _load() -> tuple[Callable[[], object], float]:
    """Return a GEMM in bf16, and its seconds."""
    a, b = (torch.randn(LOAD_SIZE, LOAD_SIZE, device=local_device(), dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)

    def gemm() -> None:
        torch.mm(a, b, out=product)

    for _ in range(10):
        gemm()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        gemm()
    torch.cuda.synchronize()
    return gemm, (time.perf_counter() - start) / 10


def seconds_of(call: Callable[[], object], samples: int = 8) -> float:
    """Return the median seconds of one call. On a GPU, calls are queued behind GEMMs: they meet the clocks of training, and launches
    are not timed.
    """
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
    gemm, seconds = _load()
    for _ in range(math.ceil(max(LOAD_SECONDS, 1.5 * host * samples) / seconds)):
        gemm()
    for mark in marks[:-1]:
        mark.record()
        call()
    marks[-1].record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) * 1e-3 for a, b in zip(marks, marks[1:]))
    return times[samples // 2]


def both_passes(sizes: Point, forward: Callable[[], Outputs], inputs: Sequence[torch.Tensor]) -> Iterator[Point]:
    """Yield the points of the forward and backward pass of a differentiable call.

    The backward pass takes the time of both passes minus that of the forward pass. The outputs' gradients are contiguous, as those
    of a following operation are: a copy of a strided one would be timed as well.

    Args:
        forward: the call. It returns one output or several.
        inputs: leaves whose gradients the backward pass computes. They are returned, not added to `.grad`: in training the gradients
            of activations are not accumulated either, and adding them would take as long as some of the operations. A weight whose
            gradient the call itself adds to `main_grad`, as Transformer Engine's linears do, gets none.
    """

    def outputs() -> tuple[torch.Tensor, ...]:
        found = forward()
        return (found,) if isinstance(found, torch.Tensor) else found

    given = [torch.randn(y.shape, dtype=y.dtype, device=y.device) for y in outputs()]

    def forward_backward() -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad(outputs(), inputs, given, allow_unused=True)

    for one, gradient in zip(inputs, forward_backward(), strict=True):
        assert gradient is not None or hasattr(one, "main_grad"), "an input has no gradient"
    alone, both = seconds_of(forward), seconds_of(forward_backward)
    yield {**sizes, "pass": "forward", "seconds": alone}
    yield {**sizes, "pass": "backward", "seconds": max(both - alone, 0.0)}
