"""Errors of conversions."""

from megatron_hybrid.base.errors import UserError


class ConversionError(UserError):
    """Files are damaged, unsafe, incomplete or not representable. The message names what is wrong and the remedy."""
