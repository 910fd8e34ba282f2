"""What a conversion says when it cannot be done."""


class ConversionError(ValueError):
    """Files that are damaged, unsafe, incomplete or not representable; names what is wrong and the remedy."""
