"""Write docs/measurements, and the tables in README.md and docs/, from the result files: `python benchmarks/tables.py`.

The optional `notes` of a result say what fell short and why.
"""

import json
from pathlib import Path

import figures

FOLDER = Path(__file__).resolve().parent
TARGET = FOLDER.parent / "docs" / "measurements"
LONG = 60  # rows
WITHOUT_RESULT = {"tables", "planner_memory"}
"""Scripts that write none of their own: this one, and the one that measures for planner_errors."""
NOTICE = "<!-- Written by benchmarks/tables.py from benchmarks/results. Do not edit. -->"
HEAD = f"""{NOTICE}
# Measurements

One page per benchmark. Each section names the command that wrote its result file in `benchmarks/results`. A ratio above 1 means
that ours is better. A missed goal is marked, and the notes under the table say why.
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
    scripts = [path.stem for path in sorted(FOLDER.glob("*.py")) if "__main__" in path.read_text()]
    expected = [name for name in scripts if name not in WITHOUT_RESULT]
    missing = [name for name in expected if not any(r.startswith(name) for r in results)]
    return f"Without a result yet, whatever goal they have: {', '.join(missing)}.\n" if missing else ""


def pages() -> dict[Path, str]:
    """Return all pages of measurements: one per benchmark, with a section per result file, and the list of them."""
    found: dict[str, list[dict]] = {}
    for path in sorted((FOLDER / "results").glob("*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["benchmark"], []).append(result)
    lines = [f"- [{name}]({name}.md): {', '.join(r['machine'] for r in results)}" for name, results in found.items()]
    index = "\n".join([HEAD, *filter(None, [not_run()]), *lines, ""])
    of_benchmarks = {
        TARGET / f"{name}.md": "\n".join([NOTICE, f"# {name}\n", *map(section, results)])
        for name, results in found.items()
    }
    return {TARGET / "index.md": index} | of_benchmarks


def write() -> None:
    """Write the pages, and remove those of benchmarks that are gone."""
    texts = pages()
    for path, text in texts.items():
        path.write_text(text)
    for path in set(TARGET.glob("*.md")) - texts.keys():
        path.unlink()


if __name__ == "__main__":
    write()
    figures.write()
