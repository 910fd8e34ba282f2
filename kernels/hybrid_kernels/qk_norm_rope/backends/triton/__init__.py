"""`qk_norm_rope` in Triton. `op` holds the launches and autograd; the other modules hold the kernels."""
