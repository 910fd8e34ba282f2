"""Rules of docs/development/style.md that a machine can check, over all source files."""

import ast
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from testing.prose import QUOTES_BANNED, check, main, offences
from tests.test_packaging import tracked_files

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("megatron_hybrid", "kernels", "tools", "testing", "tests", "benchmarks", "examples", "docs", "docker")
LONGEST_MEDIAN_FILE, LONGEST_MEDIAN_FUNCTION = 110, 7  # lines


def packages() -> dict[str, list[Path]]:
    """Source files by package: `megatron_hybrid/config`, `kernels/hybrid_kernels`, `tools`."""
    found: dict[str, list[Path]] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).parts
            found.setdefault("/".join(parts[:2]) if len(parts) > 2 else folder, []).append(path)
    return found


def of_package(name: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {offence}"
        for path in packages()[name]
        if not str(path).endswith(QUOTES_BANNED)
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


def test_pages_and_scripts_follow_the_style_guide():
    ours = [path for path in tracked_files() if path.suffix in (".md", ".sh", ".yaml", ".yml", ".cff")]
    found = [
        line
        for path in ours
        if "measurements" not in path.parts and path.name != "CHANGELOG.md"
        for line in check(path)
    ]
    assert not found


def test_the_command_ends_with_1_after_an_offence(tmp_path, capsys):
    (tmp_path / "README.md").write_text("It goes on.\n\n" + "word " * 40 + ".\n")
    assert main([str(tmp_path / "README.md")]) == 1
    out = capsys.readouterr().out
    assert (
        "README.md:1: 'goes on'" in out and "sentences: median 21.5 words, 90th percentile 40; at most 14 and 25" in out
    )
    (tmp_path / "README.md").write_text("It continues.\n")
    assert main([str(tmp_path / "README.md")]) == 0


def test_spelling():
    """All tracked files, by codespell; pyproject.toml lists the words that it does not know."""
    command = [sys.executable, "-m", "codespell_lib", *map(str, tracked_files())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_files_and_functions_stay_short():
    trees = [ast.parse(path.read_text()) for folder in FOLDERS[:2] for path in (ROOT / folder).rglob("*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    files = [len(path.read_text().splitlines()) for folder in FOLDERS[:2] for path in (ROOT / folder).rglob("*.py")]
    assert median(n for n in files if n) <= LONGEST_MEDIAN_FILE
    assert median(node.end_lineno - node.lineno + 1 for node in functions) <= LONGEST_MEDIAN_FUNCTION
