"""What a conversion says when it cannot be done."""

from megatron_hybrid.base.errors import UserError


class ConversionError(UserError):
    """Files that are damaged, unsafe, incomplete or not representable; names what is wrong and the remedy."""
