"""Conditions that select layouts by their degrees, as --why takes them."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_hybrid.base.errors import ConfigError, shown

_BOOLEANS = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}
_READERS: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(("tp", "pp", "vpp", "cp", "dp", "mbs"), int),
    "recompute": str,
    **dict.fromkeys(("sp", "zero"), lambda text: _BOOLEANS[text.lower()]),
}


def parse_condition(text: str) -> dict[str, Any]:
    """Read a condition: `tp=4,recompute=none` -> `{"tp": 4, "recompute": "none"}`.

    Raises:
        ConfigError: a degree is unknown, or has no value.
    """
    wanted = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            wanted[name] = _READERS[name](value)
        except (KeyError, ValueError):
            raise ConfigError.at(
                "why", f"{shown(part)} is not one of {', '.join(_READERS)} with a value, as in tp=4"
            ) from None
    return wanted


def matches(degrees: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return True if `degrees` meet the condition. A rejection that leaves a degree out is about all of its values."""
    return all(degrees.get(name, value) == value for name, value in wanted.items()) and any(
        name in degrees for name in wanted
    )
