"""Backends of `rmsnorm`, one folder or module each."""
