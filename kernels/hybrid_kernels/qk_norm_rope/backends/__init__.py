"""Backends of `qk_norm_rope`, one folder or module each."""
