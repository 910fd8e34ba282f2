"""Backends of `gated_delta_step`."""
