"""`gated_delta_rule` in Triton. `op` holds the launches and autograd; the other modules hold the kernels."""
