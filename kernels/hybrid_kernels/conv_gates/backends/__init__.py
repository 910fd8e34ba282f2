"""Backends of `conv_gates`, one folder or module each."""
