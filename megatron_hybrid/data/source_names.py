"""Short names of a blend's sources, for metrics."""

from collections.abc import Sequence
from itertools import count
from pathlib import PurePath


def short_names(paths: Sequence[str]) -> list[str]:
    """Return a name for each path: the parts in which the paths differ, such as `web` and `code` for `data/web/*.npy` and
    `data/code/*.npy`. Paths that occur twice get a number.
    """
    parts = [PurePath(path).parts for path in paths]
    shortest = min(map(len, parts))
    before = _common(parts, shortest - 1)
    after = _common([part[::-1] for part in parts], shortest - 1 - before)
    names = ["/".join(part[before : len(part) - after]) for part in parts]
    found: list[str] = []
    for name in names:
        numbered = (name if number == 1 else f"{name}-{number}" for number in count(1))
        found.append(next(one for one in numbered if one not in found))
    return found


def _common(parts: Sequence[Sequence[str]], most: int) -> int:
    """Return the number of first parts that all have in common, up to `most`."""
    return next((i for i in range(most) if len({part[i] for part in parts}) > 1), most)
