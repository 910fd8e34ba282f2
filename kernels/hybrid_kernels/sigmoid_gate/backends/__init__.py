"""Backends of `sigmoid_gate`, one folder or module each."""
