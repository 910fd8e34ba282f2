"""Scans of `gated_delta_rule` in Gluon for Hopper. `op` holds the launches; `scan` and `parts` hold the kernels."""
