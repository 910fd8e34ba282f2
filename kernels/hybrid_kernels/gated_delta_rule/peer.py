"""fla's chunk_gated_delta_rule behind this op's signature: the peer of the benchmarks, and a backend to fall on by name."""

import torch


def gated_delta_rule_fla(
    q, k, v, g, beta, *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Arguments and results: `gated_delta_rule`. Needs the package flash-linear-attention and a CUDA device."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(),
    )  # fmt: skip
