"""Rules of docs/development/style.md that a machine can check: `python -m testing.prose FILE...`.

It prints an offence per line and ends with status 1 if there are any: docstrings with a wrong beginning, banned expressions, and pages
whose sentences are too long. With --lengths it prints the length of sentences in pages instead.
"""

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

NOT_A_BEGINNING = ("Of", "What", "Whether", "Who", "How", "Where", "By", "Those")
BANNED = re.compile(
    r"\b(anew|in vain|for good|whoever|hush(?:es)?|eats|so many|let(?:s|ting)? go of|is told of|goes on|beside|lies)\b",
    re.IGNORECASE,
)
LONGEST_MEDIAN, LONGEST_90TH = 14, 25
"""Words per sentence in README and guides."""
QUOTES_BANNED = ("docs/development/style.md", "testing/prose.py", "tests/test_style.py")
"""Files that name the banned expressions."""

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


def too_long(text: str) -> str:
    """Return what is wrong with the length of a page's sentences; empty if nothing is."""
    counts = lengths(text)
    if not counts:
        return ""
    middle, long = median_and_90th(counts)
    if middle <= LONGEST_MEDIAN and long <= LONGEST_90TH:
        return ""
    return f"sentences: median {middle:g} words, 90th percentile {long}; at most {LONGEST_MEDIAN} and {LONGEST_90TH}"


def banned(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and offence of each banned expression."""
    for number, line in enumerate(text.splitlines(), 1):
        for match in BANNED.finditer(line):
            yield number, f"{match[0]!r}"


def offences(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and offence of each docstring with a wrong beginning and each banned expression in a source text."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words and re.sub(r"\W", "", words[0]) in NOT_A_BEGINNING:
                yield getattr(node, "lineno", 1), f"docstring begins with {words[0]!r}"
    yield from banned(text)


def is_guide(path: Path) -> bool:
    """Return True for pages whose sentences have to be short: README and guides."""
    return path.suffix == ".md" and (path.name == "README.md" or path.parent.name in ("docs", "guides"))


def check(path: Path) -> Iterator[str]:
    """Yield the offences of a file, each with file and line."""
    if str(path).endswith(QUOTES_BANNED):
        return
    text = path.read_text()
    for line, offence in offences(text) if path.suffix == ".py" else banned(text):
        yield f"{path}:{line}: {offence}"
    if is_guide(path) and (problem := too_long(text)):
        yield f"{path}: {problem}"


def main(arguments: Sequence[str]) -> int:
    """Check the files, or print the lengths of their sentences."""
    if "--lengths" in arguments:
        for page in arguments:
            if page != "--lengths":
                found = lengths(Path(page).read_text())
                middle, long = median_and_90th(found)
                print(f"{page}: {len(found)} sentences, median {middle:g} words, 90th percentile {long}")
        return 0
    found = [line for name in arguments for line in check(Path(name))]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
