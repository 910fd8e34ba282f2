"""Make Triton's interpreter faster when this is imported: it replaces the functions of triton.language once per launch.

Triton 3.6 does it at each call of a device function as well, which is half of the time that kernels take.
"""

from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter

_replace: Callable[[Callable], Any] = interpreter._patch_lang
_launch = interpreter.GridExecutor.__call__
_done: set[Callable] = set()
"""Functions in whose modules it is done, of the kernel that runs."""


def _replace_once(function: Callable) -> Any:
    """Return what restores the functions, which only the launch uses."""
    if function in _done:
        return None
    _done.add(function)
    return _replace(function)


def _launch_replacing(self: interpreter.GridExecutor, *arguments: Any, **options: Any) -> None:
    _done.clear()
    _launch(self, *arguments, **options)


interpreter._patch_lang = _replace_once
interpreter.GridExecutor.__call__ = _launch_replacing
