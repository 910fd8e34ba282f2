"""Backends of `head_norm_rope`, one folder or module each."""
