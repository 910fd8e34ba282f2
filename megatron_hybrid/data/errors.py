"""What is wrong with data, for the person who gave it."""

from megatron_hybrid.config.errors import UserError


class DataError(UserError):
    """Input or token data that cannot be used. The message names the file, the line or byte offset, and the remedy."""
