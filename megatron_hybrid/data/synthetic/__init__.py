"""Generators of synthetic tasks that separate architectures by what they can express."""
