"""Backends of `linear_cross_entropy`, one folder or module each."""
