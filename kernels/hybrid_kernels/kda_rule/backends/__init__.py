"""Fast backends of `kda_rule`. `fla` calls flash-linear-attention's kernels."""
