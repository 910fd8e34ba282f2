"""Kernels of Gated DeltaNet hybrids: each op has a plain-torch oracle, faster versions, and one dispatch.

    conv_gates          packed in_proj output -> q, k, v, g, beta   (conv + SiLU + L2 norm + gates)
    gated_delta_rule    q, k, v, g, beta -> o                       (chunked gated delta rule)
    gated_rmsnorm       o, gate -> y                                (per-head RMSNorm x SiLU gate)
    qk_norm_rope        packed qkv -> q, k, v                       (RMSNorm over whole projections + RoPE)
    linear_cross_entropy  hidden, weight, labels -> loss            (cross-entropy + z-loss, logits in chunks)

Import an op from its own module, e.g. ``from hybrid_kernels.gated_delta_rule import gated_delta_rule``.
This package knows nothing of megatron; its CPU path needs torch alone.
"""
