"""Folder, table type and result files of the pages of results: drope_yarn_page.py, paper_page.py and scaling_page.py use them."""

import json
from collections.abc import Callable, Iterable, Iterator

from report import RESULTS

PAGE = RESULTS.parents[1] / "docs" / "results"
"""Folder of the pages and their figures."""
MakeTable = Callable[[Iterable[str], Iterable[Iterable[str]]], str]
"""Makes a Markdown table of a head and rows."""
NOT_RUN = "Not run yet.\n"


def results_of(name: str) -> Iterator[dict]:
    """Yield the result files of a benchmark, or of all whose names match a pattern, in the order of their names."""
    for path in sorted(RESULTS.glob(f"{name}-*.json")):
        yield json.loads(path.read_text())


def newest_result(name: str) -> dict | None:
    """Return the newest result file of a benchmark, or None if there is none."""
    return max(results_of(name), key=lambda found: found["date"], default=None)
