"""Layers on Transformer Engine as they were, to compare with what the backend builds now."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def transformer_engine_norms() -> Iterator[None]:
    """Build layers with Transformer Engine's norms, fused into linears where they are in front of one.

    They run in cuDNN: its own are not tuned for widths such as 3840. It reads the variables at its first norm, once per process. A
    user's own values stay.
    """
    from megatron_hybrid.model.backends import transformer_engine as backends

    for name in ("NVTE_NORM_FWD_USE_CUDNN", "NVTE_NORM_BWD_USE_CUDNN"):
        os.environ.setdefault(name, "1")
    made = backends.transformer_engine
    with mock.patch.object(
        backends, "transformer_engine", lambda precision: backends.transformer_engine_norms(made(precision))
    ):
        yield


@contextmanager
def casts_in_linears() -> Iterator[None]:
    """Let linears cast all of their inputs and gradients to FP8 themselves."""
    from megatron_hybrid.model.backends import transformer_engine as backends

    with mock.patch.object(backends, "current_scaling", lambda: None):
        yield


SETTINGS = {"Transformer Engine's norms": transformer_engine_norms, "casts in linears": casts_in_linears}
