"""`rmsnorm` in Triton. `op` holds the launches and autograd; the other modules hold the kernels."""
