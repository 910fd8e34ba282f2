"""Compare this tree with an earlier one on one GPU: training bit by bit, and the time of a training step.

python benchmarks/before_after.py --before FOLDER

FOLDER is a checkout of the earlier commit. Curves are those of `testing/gpu_jobs.py`: ten steps in each format. Step times
are those of `train_step.py`: both trees in turn, twice, so that both meet the same clocks.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CURVES = (
    *("bf16", "bf16, local", "bf16, selective recompute", "bf16, YaRN"),
    *("fp8 delayed", "fp8 tensorwise", "fp8 blockwise", "fp8 tensorwise, attention"),
    *("fp8 tensorwise, parameters", "fp8 delayed, parameters", "fp8 tensorwise, full recompute"),
)
STEPS = "TP1, (bf16|FP8 tensorwise|FP8 delayed, attention)$"
ROUNDS = 2
SLOWER = 1.01
"""A step may take this many times as long as before."""


def main() -> None:
    from kernel_timing import write_gpu

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the earlier commit")
    parser.add_argument("--only", choices=("bits", "steps"), help="compare only these")
    parser.add_argument("--record", type=Path, help="only write this tree's curves to a file")
    args, _ = parser.parse_known_args()
    if args.record:
        args.record.write_text(json.dumps(record()))
        return
    trees = {"before": args.before.resolve(), "after": ROOT}
    for name, compare in (("bits", compare_bits), ("steps", compare_steps)):
        if args.only in (None, name):
            write_gpu(f"before_after_{name}", compare(trees))


def record() -> dict:
    """Return {job: {losses, norms}} of the tree in PYTHONPATH, floats in hexadecimal."""
    try:
        jobs = importlib.import_module("testing.gpu_jobs")
    except ModuleNotFoundError:  # the name before the `testing` package
        jobs = importlib.import_module("tests.gpu.jobs")
    with tempfile.TemporaryDirectory() as folder:
        found = jobs.on_one_gpu(Path(folder), (), CURVES)
    return {
        name: {key: [float(x).hex() for x in one[key]] for key in ("losses", "norms")} for name, one in found.items()
    }


def run(tree: Path, script: Path, *arguments: str) -> str:
    path = os.pathsep.join(map(str, (tree, tree / "kernels", os.environ.get("PYTHONPATH", ""))))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-P", str(script), *arguments], cwd=tree, env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"{tree}: {script.name} ended with status {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


def compare_bits(trees: dict[str, Path]) -> list[dict]:
    from report import bounded

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, tree in trees.items():
            output = Path(folder) / f"{name}.json"
            run(tree, Path(__file__).resolve(), "--record", str(output))
            found[name] = json.loads(output.read_text())
    assert set(found["before"]) == set(found["after"]) == set(CURVES), "both trees have every curve"
    return [
        bounded(name, "losses and gradient norms that differ in any bit", "", differing(found, name), 0)
        for name in CURVES
    ]


def differing(found: dict, name: str) -> int:
    before, after = found["before"][name], found["after"][name]
    return sum(a != b for key in before for a, b in zip(before[key], after[key], strict=True))


def compare_steps(trees: dict[str, Path]) -> list[dict]:
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in trees}
    for _ in range(ROUNDS):
        for name, tree in trees.items():
            for case, rate in steps(tree).items():
                seconds[name].setdefault(case, []).append(1 / rate)
    rows = []
    for case in seconds["after"]:
        before, after = (statistics.median(seconds[name][case]) for name in ("before", "after"))
        rows.append(step_row(case, before, after))
    return rows


def step_row(case: str, before: float, after: float) -> dict:
    from report import row

    rates = 1 / after, 1 / before
    found = row(f"step: {case}", "tokens", "tokens/s per GPU", *rates, "before", goal=1 / SLOWER, higher_is_better=True)
    return found


def steps(tree: Path) -> dict[str, float]:
    """Return {case: tokens per second} of train_step.py in a tree."""
    with tempfile.TemporaryDirectory() as folder:
        run(tree, tree / "benchmarks" / "train_step.py", "--only", STEPS, "--steps", "7", "--out", folder)
        (file,) = Path(folder).glob("*.json")
        rows = json.loads(file.read_text())["rows"]
    return {r["case"]: r["ours"] for r in rows if r["metric"] == "tokens"}


if __name__ == "__main__":
    main()
