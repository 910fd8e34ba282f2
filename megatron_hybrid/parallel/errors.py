"""Errors of this package. No torch here."""

from typing import Literal

from megatron_hybrid.config.errors import UserError


class LaunchError(UserError):
    """The environment that the launcher set is incomplete or contradicts itself; names the variables and the remedy."""

    printed_by: Literal["first rank", "each node", "each rank"] = "each rank"
