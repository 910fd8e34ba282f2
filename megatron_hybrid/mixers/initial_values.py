"""Draw initial values of tensors, as OLMo-core does."""

import math
from collections.abc import Callable

import torch

from megatron_hybrid.arch.packing import Initializer
from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import UserError

Draw = Callable[[torch.Tensor, tuple[float, ...], float, torch.Generator | None], torch.Tensor]
"""Fills a tensor, given an initializer's arguments, the model's standard deviation, and a generator (None: torch's own)."""


def _log_of_uniform(
    value: torch.Tensor, arguments: tuple[float, ...], std: float, generator: torch.Generator | None
) -> torch.Tensor:
    low, high = arguments
    return value.uniform_(low, high, generator=generator).clamp_(min=1e-4).log_()


def _inverse_softplus_of_log_uniform(
    value: torch.Tensor, arguments: tuple[float, ...], std: float, generator: torch.Generator | None
) -> torch.Tensor:
    low, high, floor = arguments
    dt = value.uniform_(math.log(low), math.log(high), generator=generator).exp_().clamp_(min=floor)
    return value.copy_(dt + torch.log(-torch.expm1(-dt)))


DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda value, _, std, generator: value.normal_(0.0, std, generator=generator),
    "ones": lambda value, *_: value.fill_(1.0),
    "zeros": lambda value, *_: value.zero_(),
    "log_of_uniform": _log_of_uniform,
    "inverse_softplus_of_log_uniform": _inverse_softplus_of_log_uniform,
}
"""Distributions by name. The module of a mixer may add others."""


def draw(
    value: torch.Tensor, initializer: Initializer, std: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Fill the fp32 tensor `value` with initial values, and return it.

    Args:
        std: the model's standard deviation, of distributions that take no other.
        generator: None: torch's current one of the tensor's device.

    Raises:
        UserError: an unknown distribution.
    """
    name = initializer.distribution
    if name not in DISTRIBUTIONS:
        raise UserError(
            f"Initializer.distribution: {name} is not one of {', '.join(DISTRIBUTIONS)}; the nearest is "
            f"{nearest.word(name, DISTRIBUTIONS)}; or add it to mixers.initial_values.DISTRIBUTIONS"
        )
    return DISTRIBUTIONS[name](value, initializer.arguments, std, generator)
