"""`gated_delta_step` in Triton. `op` holds the launch; `kernels` holds the kernel."""
