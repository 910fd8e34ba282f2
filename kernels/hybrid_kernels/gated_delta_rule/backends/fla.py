"""flash-linear-attention's chunk_gated_delta_rule behind this op's signature: the baseline of the benchmarks."""

import torch


def gated_delta_rule_fla(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, *,
    scale: float | None = None, initial_state: torch.Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """See `gated_delta_rule`. Needs the package flash-linear-attention and a CUDA device."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    results: tuple[torch.Tensor, torch.Tensor | None] = chunk_gated_delta_rule(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(),
    )  # fmt: skip
    return results
