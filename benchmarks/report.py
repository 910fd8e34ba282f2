"""Result files: benchmarks/results/<benchmark>-<machine>.json, from which benchmarks/tables.py writes docs/measurements."""

import argparse
import datetime
import json
import shlex
import sys
from pathlib import Path

from origins import Origin, origin_of_process

RESULTS = Path(__file__).resolve().parent / "results"


def row(case, metric, unit, ours, peer=None, peer_name=None, goal=None, higher_is_better=False) -> dict:
    """Return a figure of ours next to a baseline's. `ratio` above 1 means that ours is better; `goal` is for the ratio."""
    ratio = None
    if peer is not None and ours:
        ratio = round(ours / peer if higher_is_better else peer / ours, 3)
    met = None if goal is None or ratio is None else ratio >= goal
    return dict(case=case, metric=metric, unit=unit, ours=_short(ours), peer=_short(peer), peer_name=peer_name,
                ratio=ratio, goal=goal, met=met)  # fmt: skip


def bounded(case, metric, unit, ours, goal) -> dict:
    """A figure of ours that is to stay at or below a goal."""
    return dict(case=case, metric=metric, unit=unit, ours=_short(ours), peer=None, peer_name=None, ratio=None,
                goal=goal, met=None if goal is None else bool(ours <= goal))  # fmt: skip


def at_least(case, metric, unit, ours, goal, peer=None, peer_name=None) -> dict:
    """A figure of ours that is to reach a goal, next to a baseline's."""
    found = row(case, metric, unit, ours, peer, peer_name, higher_is_better=True)
    return found | {"goal": goal, "met": None if goal is None else bool(ours >= goal)}


def running_command() -> str:
    """Return the command of this process. Absolute paths, which belong to this machine, are shown as PATH."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word not in ("--out", "--commit"):
            words.append("PATH" if word.startswith("/") else shlex.quote(word))
        skip = word in ("--out", "--commit")
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def _short(x):
    return float(f"{x:.4g}") if isinstance(x, float) else x


def write(
    benchmark: str,
    rows: list[dict],
    packages: tuple[str, ...] = (),
    machine: str | None = None,
    notes=(),
    printed: int = 0,
    command: str | None = None,
    out: Path | None = None,
    origin: Origin | None = None,
) -> Path:
    """Write the result file, print its rows, and return its path.

    Args:
        packages: packages whose versions are recorded.
        machine: None: this CPU.
        printed: number of rows that were printed before.
        command: None: the running script with its arguments.
        out: folder of the file; None: the argument --out, or benchmarks/results.
        origin: of what was measured; None: this process, with `packages`, `machine` and the argument --commit.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=None, help="where git is not at hand")
    args, _ = parser.parse_known_args()
    origin = origin or origin_of_process(packages, machine, args.commit)
    known = (x for x in ("H100", "H200", "A100", "B200") if x in origin.machine)
    short = next(known, "cpu" if origin.is_cpu else origin.machine.replace(" ", "-"))
    result = dict(
        benchmark=benchmark,
        date=datetime.date.today().isoformat(),
        commit=origin.commit,
        command=command or running_command(),
        machine=origin.machine,
        versions=origin.versions,
        notes=list(notes),
    )
    lines = json.dumps(result, indent=1)[:-2]
    lines += ',\n "rows": [\n  ' + ",\n  ".join(json.dumps(r) for r in rows) + "\n ]\n}\n"
    folder = out or args.out
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}-{short}.json"
    path.write_text(lines)
    for r in rows[printed:]:
        print(*(f"{k}={v}" for k, v in r.items() if v is not None), flush=True)
    return path
