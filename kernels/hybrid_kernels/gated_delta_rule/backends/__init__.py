"""Backends of `gated_delta_rule`, one folder or module each."""
