"""Layer patterns: the shorthand for a model's blocks, such as `GGGA*8`."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from megatron_hybrid.base.errors import shown

MAX_LAYERS = 4096
"""More than any model has. A slip such as GGGA*999999999 must not cost memory."""
Titles = Mapping[str, str]
"""Words for the block of every symbol."""


def expand_pattern(pattern: str, titles: Titles) -> tuple[str, ...]:
    """Return the symbol of every layer: `"GGGA*2,GA"` -> `("G", "G", "G", "A", "G", "G", "G", "A", "G", "A")`.

    Commas separate groups of symbols. `*n` repeats its group n times. Spaces do not count.

    Raises:
        ValueError: an unknown symbol, a malformed repeat, or more than MAX_LAYERS layers.
    """
    return _expand(pattern, tuple(titles.items()))


@lru_cache
def _expand(pattern: str, titles: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    grammar = _grammar("".join(symbol for symbol, _ in titles))
    layers = ""
    for group in pattern.replace(" ", "").split(","):
        match = grammar.fullmatch(group)
        if not match:
            upper = pattern.upper()
            hint = f"; did you mean {upper}?" if upper != pattern and _is_pattern(upper, grammar) else ""
            symbols = ", ".join(f"{symbol} ({title})" for symbol, title in titles)
            raise ValueError(
                f"{shown(group)} is not a group of layers; write symbols {symbols} and optionally *n, as in GGGA*8 or "
                f"GGGA*7,GGA{hint}"
            )
        unit, repeats = match[1], match[2] or "1"
        room = (MAX_LAYERS - len(layers)) // len(unit)
        if len(repeats) > 9 or int(repeats) > room:
            best = f"the nearest is {unit[:MAX_LAYERS]}*{room}" if room > 0 and len(unit) < 99 else "remove this group"
            raise ValueError(f"{shown(group)} makes more than {MAX_LAYERS} layers; {best}")
        layers += unit * int(repeats)
    return tuple(layers)


@lru_cache
def _grammar(symbols: str) -> re.Pattern[str]:
    return re.compile(rf"([{re.escape(symbols)}]+)(?:\*([1-9][0-9]*))?")


def _is_pattern(text: str, grammar: re.Pattern[str]) -> bool:
    return all(grammar.fullmatch(group) for group in text.replace(" ", "").split(","))


def fold_pattern(layers: Sequence[str]) -> str:
    """Return a short pattern for `layers`: `GGGA*2` for `GGGAGGGA`, `GGGA*7,GGA` where a remainder is left."""
    text = "".join(layers)
    best = text
    for width in range(1, len(text) // 2 + 1):
        repeats = 1
        while text.startswith(text[:width], repeats * width):
            repeats += 1
        rest = text[repeats * width :]
        folded = f"{text[:width]}*{repeats}" + (f",{rest}" if rest else "")
        best = min(best, folded, key=len) if repeats > 1 else best
    return best
