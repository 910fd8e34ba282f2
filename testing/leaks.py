"""Leaks between documents, planted to show that a test finds them."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from megatron_hybrid.mixers.attention import local
from megatron_hybrid.mixers.gated_delta_net import module as gated_delta_net

SHARE = 1e-3
"""Part of what is beyond a boundary that comes through."""


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Plant a leak by its name in LEAKS; None: plant nothing."""
    if name is None:
        yield
        return
    with LEAKS[name]():
        yield


def _mixed(function):
    """Return a function of packed rows whose results contain SHARE of those without documents."""

    def leaking(*arguments, positions_bs, **options):
        apart = function(*arguments, positions_bs=positions_bs, **options)
        together = function(*arguments, positions_bs=None, **options)
        if isinstance(apart, torch.Tensor):
            return torch.lerp(apart, together, SHARE)
        return tuple(torch.lerp(a, b, SHARE) for a, b in zip(apart, together, strict=True))

    return leaking


def _state():
    return patch.object(
        gated_delta_net, "gated_delta_rule_of_slices", _mixed(gated_delta_net.gated_delta_rule_of_slices)
    )


def _taps():
    return patch.object(gated_delta_net, "conv_gates", _mixed(gated_delta_net.conv_gates))


def _column():
    """Let each token see the token before its document, a little."""
    attend = local.attend_in_documents

    def leaking(q, k, v, starts_bs, *options):
        apart = attend(q, k, v, starts_bs, *options)
        return torch.lerp(apart, attend(q, k, v, (starts_bs - 1).clamp(min=0), *options), SHARE)

    return patch.object(local, "attend_in_documents", leaking)


LEAKS = {"state": _state, "taps": _taps, "attention column": _column}
