"""Measurements of a GPU, and of collectives between ranks, from which the planner's hardware files are fitted.

Each point is a dictionary: `op`, `pass` (forward, backward, or none), sizes, and the median `seconds` of one call. The time of a
backward pass is that of forward and backward minus that of forward. Linears are Transformer Engine's if it is installed. They
include casts to FP8, and add the weight gradient to an fp32 buffer as in training.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product

import torch
import torch.distributed as dist

from megatron_hybrid.arch.fp8_recipes import FP8_RECIPES
from megatron_hybrid.arch.layer import layer_parameters
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import mixer_spec
from megatron_hybrid.distributed.device import has_cuda, local_device
from megatron_hybrid.distributed.timing import Point, both_passes, seconds_of
from megatron_hybrid.precision.recipes import fp8_context

FORMATS = ("bf16", *FP8_RECIPES)
MESSAGES = (2**16, 2**20, 2**24, 2**27, 2**29)  # bytes of a collective's whole tensor


def device_points(model: ModelConfig, tokens: int = 8192, degrees: Sequence[int] = (1, 2, 4, 8)) -> Iterator[Point]:
    """Yield the points of this process's device, at the model's widths under each tensor parallel degree.

    Under the first degree, linears also have four times the tokens: one number of tokens does not tell FLOPs from bytes. Mixers that
    declare `has_rates` measure their own operations (`mixers/<name>/rates.py`).
    """
    yield from copy_points(tokens * model.ffn_hidden_size * 4)
    formats = FORMATS if has_cuda() and find_spec("transformer_engine") else FORMATS[:1]
    for degree in degrees:
        counts = (tokens, 4 * tokens) if degree == degrees[0] else (tokens,)
        for form in formats:
            for m, (n, k) in product(counts, sorted(linear_shapes(model, degree))):
                yield from _tried(linear_points(form, m, n, k), form)
        for block in {block.mixer: block for block in model.blocks_by_symbol.values()}.values():
            spec = mixer_spec(block.mixer)
            for form in ("bf16", "fp8") if spec.has_rates and len(formats) > 1 else ("bf16",) if spec.has_rates else ():
                yield from _tried(import_module(spec.rates).points(model, block, degree, tokens, form), form)


def _tried(points: Iterator[Point], form: str) -> Iterator[Point]:
    """Yield points. If the device or library does not support a format, print the reason instead."""
    try:
        yield from points
    except (RuntimeError, ValueError, AssertionError) as error:
        if form == "bf16":
            raise
        print(f"{form} cannot be measured: {str(error)[:200]}", flush=True)


def linear_shapes(model: ModelConfig, degree: int) -> set[tuple[int, int]]:
    """Return the (out, in) shapes of all linears on a rank."""
    parameters = (p for block in model.blocks_by_symbol.values() for p in layer_parameters(model, block) if p.is_gemm)
    return {(rows, columns) for rows, columns in (parameter.rank_shape(degree) for parameter in parameters)}


def linear_points(form: str, m: int, n: int, k: int) -> Iterator[Point]:
    """Yield the points of a linear with weight [n, k] and m tokens."""
    device = local_device()
    dtype = torch.bfloat16
    x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    if has_cuda() and find_spec("transformer_engine"):
        import transformer_engine.pytorch as te

        linear = te.Linear(k, n, bias=False, params_dtype=dtype, device=device, fuse_wgrad_accumulation=True)
        linear.weight.main_grad = torch.zeros(n, k, device=device)
        if form != "bf16":
            context = fp8_context(FP8_RECIPES[form])
    else:
        linear = torch.nn.Linear(k, n, bias=False, device=device, dtype=dtype)

    def forward() -> torch.Tensor:
        with context():
            y: torch.Tensor = linear(x)
            return y

    yield from both_passes({"op": "linear", "format": form, "m": m, "n": n, "k": k}, forward, (x, linear.weight))


def copy_points(size: int) -> Iterator[Point]:
    """Yield the point of a device-to-device copy. `bytes` counts read and written bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=local_device())
    target = torch.empty_like(source)
    yield {"op": "copy", "pass": "none", "bytes": 2 * size, "seconds": seconds_of(lambda: target.copy_(source))}


def collective_points(sizes: Sequence[int] = MESSAGES) -> Iterator[Point]:
    """Yield the points of collectives over all ranks. `bytes` is the size of the whole tensor, or of a point-to-point message."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for size in sizes:
        count = size // 2 // ranks * ranks
        whole = torch.zeros(count, dtype=torch.bfloat16, device=local_device())
        part = whole[: count // ranks].clone()

        def neighbours(mine: torch.Tensor = whole[: count // 2], theirs: torch.Tensor = whole[count // 2 :]) -> None:
            if (other := rank ^ 1) < ranks:
                both = [dist.P2POp(dist.isend, mine, other), dist.P2POp(dist.irecv, theirs, other)]
                for request in dist.batch_isend_irecv(both):
                    request.wait()

        calls: dict[str, Callable[[], object]] = {
            "all_reduce": partial(dist.all_reduce, whole),
            "all_gather": partial(dist.all_gather_into_tensor, whole, part),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, part, whole),
        }
        for name, call in calls.items():
            yield {"op": name, "pass": "none", "ranks": ranks, "bytes": 2 * count, "seconds": _slowest(call)}
        yield {"op": "p2p", "pass": "none", "ranks": 2, "bytes": count, "seconds": _slowest(neighbours)}


def _slowest(call: Callable[[], object]) -> float:
    """Return the seconds of a collective on the slowest rank."""
    seconds = torch.tensor(seconds_of(call), device=local_device())
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)
