"""What is wrong with data, for the person who gave it."""


class DataError(ValueError):
    """Input or token data that cannot be used. The message names the file, the line or byte offset, and the remedy."""
