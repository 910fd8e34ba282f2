"""Measurements of a GPU, and of collectives between ranks, from which the planner's hardware files are fitted.

Each point is a dictionary: `op`, `pass` (forward, backward, or none), sizes, and the median `seconds` of one call. The time of a
backward pass is that of forward and backward minus that of forward. Linears are Transformer Engine's if it is installed. They
include casts to FP8, and add the weight gradient to an fp32 buffer as in training.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from hybrid_kernels.conv_gates import conv_gates
from hybrid_kernels.gated_delta_rule import gated_delta_rule
from hybrid_kernels.gated_rmsnorm import gated_rmsnorm
from megatron_hybrid.arch.fp8_recipes import ATTENTION, FP8_RECIPES, Fp8Recipe
from megatron_hybrid.arch.layer import layer_parameters
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.packing import PackedParameter
from megatron_hybrid.arch.registry import mixer_spec
from megatron_hybrid.distributed.device import has_cuda, local_device
from megatron_hybrid.mixers.gated_delta_net.spec import sizes as gdn_sizes
from megatron_hybrid.precision.recipes import transformer_engine_recipe

Point = dict[str, Any]
FORMATS = ("bf16", *FP8_RECIPES)
MESSAGES = (2**16, 2**20, 2**24, 2**27, 2**29)  # bytes of a collective's whole tensor


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


def _both(sizes: Point, forward: Callable[[], torch.Tensor]) -> Iterator[Point]:
    """Yield the points of the forward and backward pass of a differentiable call."""

    def forward_backward() -> None:
        y = forward()
        y.backward(y.detach())

    alone, both = seconds_of(forward), seconds_of(forward_backward)
    yield {**sizes, "pass": "forward", "seconds": alone}
    yield {**sizes, "pass": "backward", "seconds": max(both - alone, 0.0)}


def device_points(model: ModelConfig, tokens: int = 8192, degrees: Sequence[int] = (1, 2, 4, 8)) -> Iterator[Point]:
    """Yield the points of this process's device, at the model's widths under each tensor parallel degree.

    Attention and the delta rule are also measured at a quarter of `tokens` and at four times as many.
    """
    yield from copy_points(tokens * model.ffn_hidden_size * 4)
    formats = FORMATS if has_cuda() and find_spec("transformer_engine") else FORMATS[:1]
    for degree in degrees:
        for form in formats:
            for n, k in sorted(linear_shapes(model, degree)):
                yield from _tried(linear_points(form, tokens, n, k), form)
        for sequence in (tokens // 4, tokens, 4 * tokens) if degree <= 2 else (tokens,):
            if mixer_parameters(model, "attention"):
                for form in ("bf16", "fp8") if len(formats) > 1 else ("bf16",):
                    yield from _tried(attention_points(form, model, degree, sequence), form)
            if mixer_parameters(model, "gated_delta_net"):
                yield from delta_rule_points(model, degree, sequence)
        if mixer_parameters(model, "gated_delta_net"):
            yield from glue_points(model, degree, tokens)
    if mixer_parameters(model, "gated_delta_net"):
        yield from delta_rule_points(model, 1, tokens, batch=4)


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


def mixer_parameters(model: ModelConfig, name: str) -> dict[str, PackedParameter]:
    """Return the parameters of the mixer called `name` by their names; none where the model has no such layer."""
    blocks = [block for block in model.blocks_by_symbol.values() if block.mixer == name]
    return {p.name: p for block in blocks[:1] for p in mixer_spec(name).parameters(model, block)}


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
            context = _fp8_context(FP8_RECIPES[form])
    else:
        linear = torch.nn.Linear(k, n, bias=False, device=device, dtype=dtype)

    def forward() -> torch.Tensor:
        with context():
            y: torch.Tensor = linear(x)
            return y

    yield from _both({"op": "linear", "format": form, "m": m, "n": n, "k": k}, forward)


def _fp8_context(recipe: Fp8Recipe, **options: bool) -> Callable[[], AbstractContextManager[object]]:
    import transformer_engine.pytorch as te

    scaling = transformer_engine_recipe(recipe, **options)
    return lambda: te.fp8_autocast(enabled=True, fp8_recipe=scaling)


def attention_points(form: str, model: ModelConfig, degree: int, sequence: int, batch: int = 1) -> Iterator[Point]:
    """Yield the points of causal attention with a rank's heads. FP8 uses delayed scaling."""
    d, qkv = model.attention_head_dim, mixer_parameters(model, "attention")["linear_qkv.weight"]
    heads, groups, _ = (width // d for width in qkv.rank_sizes(degree))
    device, dtype = local_device(), torch.bfloat16
    q = torch.randn(sequence, batch, heads, d, device=device, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(sequence, batch, groups, d, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    if has_cuda() and find_spec("transformer_engine"):
        import transformer_engine.pytorch as te

        attention = te.DotProductAttention(heads, d, num_gqa_groups=groups, attn_mask_type="causal", qkv_format="sbhd")

        context = nullcontext if form == "bf16" else _fp8_context(ATTENTION, fp8_dpa=True)

        def forward() -> torch.Tensor:
            with context():
                y: torch.Tensor = attention(q, k, v)
                return y
    else:

        def forward() -> torch.Tensor:
            q_, k_, v_ = (t.permute(1, 2, 0, 3) for t in (q, k, v))
            return F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=heads != groups)

    sizes_ = {"op": "attention", "format": form, "sequence": sequence, "batch": batch, "heads": heads, "head_dim": d}
    yield from _both(sizes_, forward)


def delta_rule_points(model: ModelConfig, degree: int, sequence: int, batch: int = 1) -> Iterator[Point]:
    """Yield the points of gated_delta_rule with a rank's heads."""
    gdn, in_proj = gdn_sizes(model), mixer_parameters(model, "gated_delta_net")["in_proj.weight"]
    q_width, _, _, _, _, heads = in_proj.rank_sizes(degree)
    key_heads = q_width // gdn.key_head_dim
    device, dtype = local_device(), torch.bfloat16
    q, k = (torch.randn(batch, sequence, key_heads, gdn.key_head_dim, device=device) for _ in range(2))
    q, k = (F.normalize(t, dim=-1).to(dtype).requires_grad_() for t in (q, k))
    v = torch.randn(batch, sequence, heads, gdn.value_head_dim, device=device, dtype=dtype, requires_grad=True)
    g = (-0.1 * torch.rand(batch, sequence, heads, device=device)).requires_grad_()
    beta = (2 * torch.rand(batch, sequence, heads, device=device)).requires_grad_()
    sizes_ = {"op": "recurrence", "sequence": sequence, "batch": batch, "heads": heads}
    sizes_ |= {"key_head_dim": gdn.key_head_dim, "value_head_dim": gdn.value_head_dim}
    yield from _both(sizes_, lambda: gated_delta_rule(q, k, v, g, beta)[0])


def glue_points(model: ModelConfig, degree: int, tokens: int) -> Iterator[Point]:
    """Yield the points of conv_gates and gated_rmsnorm, the operations between projections and delta rule."""
    gdn, parameters = gdn_sizes(model), mixer_parameters(model, "gated_delta_net")
    q_width, _, v_width, _, _, value_heads = parameters["in_proj.weight"].rank_sizes(degree)
    device, dtype = local_device(), torch.bfloat16
    packed = torch.randn(
        tokens, 1, parameters["in_proj.weight"].rank_shape(degree)[0], device=device, dtype=dtype, requires_grad=True
    )
    weight = torch.randn(parameters["conv_weight"].rank_shape(degree), device=device, dtype=dtype, requires_grad=True)
    a, dt = (torch.rand(value_heads, device=device).requires_grad_() for _ in range(2))
    heads: dict[str, Any] = dict(num_key_heads=q_width // gdn.key_head_dim, num_value_heads=value_heads)
    heads |= dict(key_head_dim=gdn.key_head_dim, value_head_dim=gdn.value_head_dim)
    sizes = {"tokens": tokens, "degree": degree}

    def all_outputs() -> torch.Tensor:
        *outputs, gate = conv_gates(packed, weight, a, dt, return_gate=True, **heads)
        joined: torch.Tensor = _Join.apply(*outputs, gate)  # type: ignore[no-untyped-call]
        return joined

    yield from _both({"op": "conv_gates", **sizes}, all_outputs)
    o = torch.randn(1, tokens, value_heads, gdn.value_head_dim, device=device, dtype=dtype, requires_grad=True)
    gate = torch.randn(tokens, 1, v_width, device=device, dtype=dtype, requires_grad=True)
    ones = torch.ones(gdn.value_head_dim, device=device, dtype=dtype, requires_grad=True)
    yield from _both({"op": "gated_norm", **sizes}, lambda: gated_rmsnorm(o, gate, ones, gdn.norm_eps))


class _Join(torch.autograd.Function):
    """Cheapest consumer of several outputs: a scalar whose gradient for each output is the output itself."""

    @staticmethod
    def forward(ctx: Any, *outputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*outputs)
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:
        return ctx.saved_tensors


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
