"""`gated_delta_rule` in CUDA C++ for Hopper. `op` builds the sources with nvcc and launches the kernels."""
