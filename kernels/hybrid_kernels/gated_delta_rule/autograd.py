"""Autograd of the fast backends of `gated_delta_rule`."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hybrid_kernels.custom_op import OptionalTensors, custom_op
from hybrid_kernels.gated_delta_rule import passes
from hybrid_kernels.gated_delta_rule.backends.triton.chunks import Chunks, Scores, ends_like
from hybrid_kernels.gated_delta_rule.kernels import choose_kernels


def _forward_like(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
    initial: torch.Tensor | None, cu_seqlens: torch.Tensor | None, positions: torch.Tensor | None, scale: float,
    output_final: bool, save: str, backend: str,
) -> OptionalTensors:  # fmt: skip
    batch, length, heads, dim_v = v.shape
    dim_k, segments = k.shape[3], choose_kernels(backend, q, v, cu_seqlens).segments
    n = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    count = batch * -(-length // 64) if cu_seqlens is None else length // 64 + min(n, length)
    chunks = Chunks(batch * segments, length, count, v, v, v, segments)
    final = v.new_empty(n, heads, dim_k, dim_v, dtype=torch.float32) if output_final else None
    kept = passes.Kept()
    if save != "inputs":
        states, new_values = chunks.states_like(v, dim_k) if save == "states" else (None, None)
        starts, ends = (ends_like(v, dim_k, chunks, wider) for wider in (False, True)) if segments > 1 else (None, None)
        kept = passes.Kept(Scores.empty(k, heads, count, positions is not None), states, new_values, starts, ends)
    return [torch.empty_like(v), final, *kept.tensors()]


@custom_op("gated_delta_rule_forward", _forward_like)
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
    initial: torch.Tensor | None, cu_seqlens: torch.Tensor | None, positions: torch.Tensor | None, scale: float,
    output_final: bool, save: str, backend: str,
) -> OptionalTensors:  # fmt: skip
    """Return o, the final state if requested, and the tensors of `Kept`."""
    call = passes.Call.of((q, k, v, g, beta), cu_seqlens, positions, scale, backend)
    o, final, kept = passes.finish_forward(call, *passes.start_forward(call), initial, output_final, save)
    return [o, final, *kept.tensors()]


def _backward_like(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
    initial: torch.Tensor | None, cu_seqlens: torch.Tensor | None, positions: torch.Tensor | None,
    kept: list[torch.Tensor | None], do: torch.Tensor, dfinal: torch.Tensor | None, scale: float, backend: str,
) -> OptionalTensors:  # fmt: skip
    dinitial = None if initial is None else torch.empty_like(initial, dtype=torch.float32)
    return [*(torch.empty_like(x) for x in (q, k, v, g, beta)), dinitial]


@custom_op("gated_delta_rule_backward", _backward_like)
def _backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
    initial: torch.Tensor | None, cu_seqlens: torch.Tensor | None, positions: torch.Tensor | None,
    kept: list[torch.Tensor | None], do: torch.Tensor, dfinal: torch.Tensor | None, scale: float, backend: str,
) -> OptionalTensors:  # fmt: skip
    """Return dq, dk, dv, dg, dbeta and, with an initial state, its gradient."""
    call = passes.Call.of((q, k, v, g, beta), cu_seqlens, positions, scale, backend)
    complete, firsts = passes.start_backward(call, passes.Kept.of(kept), initial, do)
    return passes.finish_backward(call, complete, firsts, do, dfinal, initial is not None)


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
        initial: torch.Tensor | None, cu_seqlens: torch.Tensor | None, positions: torch.Tensor | None, scale: float,
        output_final: bool, save: str, backend: str,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
        inputs = [x.contiguous() for x in (q, k, v, g, beta)]
        initial, positions = (x if x is None else x.contiguous() for x in (initial, positions))
        o, final, *kept = _forward(*inputs, initial, cu_seqlens, positions, scale, output_final, save, backend)
        ctx.save_for_backward(*inputs, initial, cu_seqlens, positions, *kept)
        ctx.scale, ctx.backend = scale, backend
        if not torch.compiler.is_compiling():  # which does not support it
            ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        do, dfinal = grads
        q, k, v, g, beta, initial, cu_seqlens, positions, *kept = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dfinal = dfinal if dfinal is None else dfinal.contiguous()
        *of_inputs, dinitial = _backward(
            q, k, v, g, beta, initial, cu_seqlens, positions, kept, do, dfinal, ctx.scale, ctx.backend
        )
        if dinitial is not None:
            dinitial = dinitial.to(initial.dtype)
        return *of_inputs, dinitial, None, None, None, None, None, None


def gated_delta_rule_fast(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, *,
    scale: float | None = None, initial_state: torch.Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None, positions_bs: torch.Tensor | None = None, save: str = "scores", backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """See `hybrid_kernels.gated_delta_rule.gated_delta_rule`. `backend`: "cuda" or "triton"."""
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    save = save if torch.is_grad_enabled() else "inputs"
    results: tuple[torch.Tensor, torch.Tensor | None] = _GatedDeltaRule.apply(
        q, k, v, g, beta, initial_state, cu_seqlens, positions_bs, scale, output_final_state, save, backend
    )
    return results
