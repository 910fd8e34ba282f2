"""Rules of docs/development/style.md that a machine can check, over all source files."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("megatron_hybrid", "kernels", "tools", "testing")
NOT_A_BEGINNING = ("Of", "What", "Whether", "Who", "How", "Where", "By", "Those")
BANNED = re.compile(
    r"\b(anew|in vain|for good|whoever|hush(?:es)?|let(?:s|ting)? go of|is told of|goes on|beside|lies)\b",
    re.IGNORECASE,
)

def packages() -> dict[str, list[Path]]:
    """Source files by package: `megatron_hybrid/config`, `kernels/hybrid_kernels`, `tools`."""
    found: dict[str, list[Path]] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).parts
            found.setdefault("/".join(parts[:2]) if len(parts) > 2 else folder, []).append(path)
    return found


def offences(text: str) -> Iterator[tuple[int, str]]:
    """Line number and offence of each docstring with a wrong beginning and each banned expression in a source text."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words and re.sub(r"\W", "", words[0]) in NOT_A_BEGINNING:
                yield getattr(node, "lineno", 1), f"docstring begins with {words[0]!r}"
    for number, line in enumerate(text.splitlines(), 1):
        for match in BANNED.finditer(line):
            yield number, f"{match[0]!r}"


def of_package(name: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {offence}"
        for path in packages()[name]
        for line, offence in offences(path.read_text())
    ]


def test_offences_are_seen():
    text = '"""What a file is."""\n\n\ndef f():\n    """Of a rank."""\n    # it goes on anew\n'
    assert list(offences(text)) == [
        (1, "docstring begins with 'What'"),
        (4, "docstring begins with 'Of'"),
        (6, "'goes on'"),
        (6, "'anew'"),
    ]
    assert not list(offences('"""Offset of a slice; besides, relies on others."""\n'))


@pytest.mark.parametrize("name", sorted(packages()))
def test_prose_follows_the_style_guide(name):
    assert not of_package(name)
