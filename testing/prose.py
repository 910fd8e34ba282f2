"""Length of sentences in Markdown pages: `python -m testing.prose PAGE...` prints the number, median and 90th percentile of words."""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

_CODE = re.compile(r"^```.*?^```[^\n]*$", re.DOTALL | re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`\[0-9])|\n{2,}")


def sentences(text: str) -> Iterator[list[str]]:
    """Yield the words of each sentence of a page, without code blocks, tables, headings and HTML.

    A list item begins a sentence.
    """
    text = _CODE.sub("\n\n", text)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "#", "<"))]
    text = re.sub(r"^(?:[-*]|\d+\.) ", "\n\n", "\n".join(lines), flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for sentence in _SENTENCE_END.split(text):
        words = re.findall(r"[\w`'./=-]*\w[\w`'./=-]*", sentence)
        if words:
            yield words


def lengths(text: str) -> list[int]:
    """Return the number of words of each sentence, in ascending order."""
    return sorted(len(words) for words in sentences(text))


def median_and_90th(counts: Sequence[int]) -> tuple[float, int]:
    """Return the median and the 90th percentile of ascending numbers."""
    return median(counts), counts[min(len(counts) - 1, int(0.9 * len(counts)))]


if __name__ == "__main__":
    for page in sys.argv[1:]:
        found = lengths(Path(page).read_text())
        middle, long = median_and_90th(found)
        print(f"{page}: {len(found)} sentences, median {middle:g} words, 90th percentile {long}")
