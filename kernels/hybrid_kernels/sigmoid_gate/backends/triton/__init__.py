"""`sigmoid_gate` in Triton. `op` holds the launches and autograd; the other module holds the kernels."""
