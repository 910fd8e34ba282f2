"""Write BENCHMARKS.md, and the tables in README.md and docs/, from the result files: `python benchmarks/tables.py`.

The optional `notes` of a result say what fell short and why.
"""

import json
from pathlib import Path

import figures

FOLDER = Path(__file__).resolve().parent
TARGET = FOLDER.parent / "BENCHMARKS.md"
LONG = 60  # rows
HELPERS = {"tables", "figures", "report", "kernel_timing", "planner_memory"}  # of which the last measures for planner_errors
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
    rows = result["rows"]
    if len(rows) > LONG:  # the rest is there to look things up in
        rows = [row for row in rows if row.get("goal") is not None]
    lines += ["| " + " | ".join(cell(row.get(c)) for c in shown) + " |" for row in rows]
    if len(rows) < len(result["rows"]):
        lines += ["", f"The rows with a goal; {len(result['rows']) - len(rows)} more are in the file."]
    notes = result.get("notes", [])
    return "\n".join(lines + [""] * bool(notes) + [f"- {note}" for note in notes]) + "\n"


def not_run() -> str:
    """Which benchmarks have no result file yet."""
    results = [path.stem for path in (FOLDER / "results").glob("*.json")]
    scripts = [path.stem for path in sorted(FOLDER.glob("*.py")) if path.stem not in HELPERS]
    missing = [name for name in scripts if not any(r.startswith(name) for r in results)]
    return f"Without a result yet, whatever goal they have: {', '.join(missing)}.\n" if missing else ""


def document() -> str:
    """The whole of BENCHMARKS.md."""
    results = [json.loads(path.read_text()) for path in sorted((FOLDER / "results").glob("*.json"))]
    return "\n".join([HEAD, *filter(None, [not_run()]), *map(section, results)])


if __name__ == "__main__":
    TARGET.write_text(document())
    figures.write()
