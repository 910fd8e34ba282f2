"""Dotted names of objects, for torch-free declarations that name classes of other libraries."""

from importlib import import_module
from typing import Any


def resolve(name: str) -> Any:
    """Import the object that a dotted name such as `torch.optim.AdamW` denotes."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)
