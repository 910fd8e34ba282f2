"""BENCHMARKS.md from the result files: `python benchmarks/tables.py`. A result's optional `notes` say what fell short and why."""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TARGET = FOLDER.parent / "BENCHMARKS.md"
HEAD = """# Benchmarks

Made from `benchmarks/results/*.json` by `python benchmarks/tables.py`; each section names the command that wrote its file.
A ratio above 1 means ours is better. A goal that was missed says so, and the notes under its table say why.
"""


def cell(value: object) -> str:
    """A value as the table shows it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return str(value).replace("|", "\\|")


def section(result: dict) -> str:
    """One result file as a heading, a line of facts, a table and its notes."""
    columns = ("case", "metric", "unit", "ours", "peer", "peer_name", "ratio", "goal", "met")
    shown = [c for c in columns if any(row.get(c) is not None for row in result["rows"])]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    lines = [
        f"## {result['benchmark']} on {result['machine']}",
        f"`{result['command']}`, {result['date']}; {versions}",
        "",
        "| " + " | ".join(shown).replace("peer_name", "peer's name") + " |",
        "|" + "---|" * len(shown),
    ]
    lines += ["| " + " | ".join(cell(row.get(c)) for c in shown) + " |" for row in result["rows"]]
    notes = result.get("notes", [])
    return "\n".join(lines + [""] * bool(notes) + [f"- {note}" for note in notes]) + "\n"


def document() -> str:
    """The whole of BENCHMARKS.md."""
    results = [json.loads(path.read_text()) for path in sorted((FOLDER / "results").glob("*.json"))]
    return "\n".join([HEAD, *map(section, results)])


if __name__ == "__main__":
    TARGET.write_text(document())
