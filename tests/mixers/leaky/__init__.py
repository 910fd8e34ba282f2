"""A mixer outside the project: a gated leaky average of past tokens. test_plugin.py copies this folder and trains with it."""

from . import spec  # noqa: F401 - registers it
