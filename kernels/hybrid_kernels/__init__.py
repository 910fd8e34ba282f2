"""Kernels of Gated DeltaNet hybrid models.

    conv_gates            packed in_proj output -> q, k, v, g, beta   (convolution, SiLU, L2 norm, gates)
    gated_delta_rule      q, k, v, g, beta -> o                       (chunked gated delta rule)
    kda_rule              q, k, v, g, beta -> o                       (the same with a decay per channel of the keys)
    gated_rmsnorm         o, gate -> y                                (per-head RMSNorm times SiLU or sigmoid gate)
    qk_norm_rope          packed qkv -> q, k, v                       (RMSNorm over whole projections, RoPE)
    head_norm_rope        packed qkv -> q, k, v, gate                 (RMSNorm over each head, RoPE)
    rmsnorm               x, weight -> y                              (RMSNorm of the residual stream, and its sum)
    sigmoid_gate          x, gate -> y                                (x times the sigmoid of the gate)
    linear_cross_entropy  hidden, weight, labels -> loss              (cross-entropy and z-loss, logits in chunks)

Each op is one folder: `__init__.py` holds the API and the dispatch, `reference.py` the oracle in plain torch, and `backends/`
the fast implementations. Import an op from its own folder: ``from hybrid_kernels.gated_delta_rule import gated_delta_rule``.

The package depends on torch alone; each fast backend names what else it needs. It does not import megatron or
torch.distributed: ops take states, halo tokens and small callables where ranks have to communicate.
"""
