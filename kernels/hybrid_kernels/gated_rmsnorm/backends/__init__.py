"""Backends of `gated_rmsnorm`, one folder or module each."""
