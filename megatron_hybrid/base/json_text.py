"""Bounded JSON of unknown origin: objects without duplicate keys, in bounded time and memory.

A text of n bytes can expand to 20 n bytes of Python objects. So both its size and its number of values are limited, before it is
parsed.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_hybrid.base.errors import UserError

MAX_VALUES = 1_500_000
"""Most values in a text. Parsed, they take at most about 200 MB."""
_LONGEST_INTEGER = 64
"""Digits. transformers writes 10^30 for no limit."""


def read_json_object(path: Path, limit: int, error: type[UserError], most_values: int = MAX_VALUES) -> dict[str, Any]:
    """Return the object in a JSON file of at most `limit` bytes.

    Raises:
        error: as `parse_json_object`, or the file is too large.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise error(f"{path}: larger than {limit >> 20} MiB; no such file is that large")
    return parse_json_object(data, str(path), error, most_values)


def parse_json_object(data: bytes, where: str, error: type[UserError], most_values: int = MAX_VALUES) -> dict[str, Any]:
    """Parse UTF-8 JSON that is an object.

    Args:
        where: origin of the text, for errors.

    Raises:
        error: not JSON, not an object, a key that occurs twice, too many values, or too deep a nesting.
    """
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > most_values:
        raise error(f"{where}: more than {most_values:,} values; no such file has that many")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = _first_duplicate(key for key, _ in pairs)
            raise error(f"{where}: {twice!r:.200} occurs twice")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_int=_parse_integer)
    except error:
        raise
    except (ValueError, RecursionError) as failure:  # also UnicodeDecodeError
        raise error(f"{where}: not readable JSON ({str(failure)[:200]})") from None
    if not isinstance(value, dict):
        raise error(f"{where}: not a JSON object")
    return value


def _first_duplicate(keys: Iterable[str]) -> str | None:
    seen: set[str] = set()
    return next((key for key in keys if key in seen or seen.add(key)), None)  # type: ignore[func-returns-value]


def _parse_integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)
