"""Compare training with another commit, bit by bit: 20 steps under every layout on CPU ranks over gloo, fp32.

python benchmarks/curve_bits.py --against COMMIT

A change that claims to keep behaviour shows it with this script. Both trees run on the same machine, one after the other.
The other commit is checked out into a temporary git worktree.
"""

import argparse
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VALUES = ("losses", "norms", "parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="the commit to compare with")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="only write the bits of the tree in PYTHONPATH to FILE"
    )
    args, _ = parser.parse_known_args()
    if args.record:
        args.record.write_text(json.dumps(record()))
        return
    if not args.against:
        parser.error("give --against COMMIT")
    with tempfile.TemporaryDirectory() as folder, checked_out(args.against, Path(folder) / "before") as before:
        found = [run(tree, Path(folder) / f"{name}.json") for name, tree in (("before", before), ("after", ROOT))]
    report(args.against, *found)


@contextmanager
def checked_out(commit: str, folder: Path):
    """Yield a temporary git worktree of a commit."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", "--quiet", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def run(tree: Path, output: Path) -> dict:
    """Record the bits of a tree in a process of its own."""
    path = os.pathsep.join([str(tree), str(tree / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--record", str(output)]
    subprocess.run(command, check=True, cwd=tree, env=environment)
    return json.loads(output.read_text())


def record() -> dict:
    """Return {layout: {losses, norms, parameters}}: floats in hexadecimal, and a SHA-256 of the parameters of all ranks."""
    jobs, ranks = _first("testing.jobs", "tests.jobs"), _first("testing.ranks", "tests.ranks")
    layouts = _first("testing.layouts", "tests.distributed.test_same_curve")
    pool, found = ranks.RankPool(), {}
    for name, (count, parallel) in {"one rank": (1, layouts.layout()), **layouts.LAYOUTS}.items():
        deep = parallel["pipeline_parallel_size"] * parallel["virtual_pipeline_parallel_size"] > 2
        model = layouts.MODEL | {"layer_pattern": layouts.DEEP if deep else layouts.SHALLOW}
        results = pool.run(jobs.curve, count, model=model, parallel=parallel, train=layouts.TRAIN, steps=20)
        found[name] = {key: [float(x).hex() for x in results[0][key]] for key in ("losses", "norms")}
        found[name]["parameters"] = _digest(results)
    return found


def _first(*modules: str):
    """Import the first module that exists: commits before the `testing` package have it under another name."""
    for name in modules[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    return importlib.import_module(modules[-1])


def _digest(results: list[dict]) -> str:
    digest = hashlib.sha256()
    for result in results:
        for name, parameter in sorted(result["parameters"].items()):
            digest.update(name.encode())
            digest.update(parameter.contiguous().numpy().tobytes())
    return digest.hexdigest()


def report(commit: str, before: dict, after: dict) -> None:
    """Write a row per layout: how many of its values differ."""
    from report import bounded, write

    rows = []
    for name in before | after:
        differ = sum(before.get(name, {}).get(key) != after.get(name, {}).get(key) for key in VALUES)
        rows.append(bounded(name, "losses, gradient norms, parameters that differ in any bit", "", differ, 0))
    write("curve_bits", rows, ("torch", "megatron-core"), notes=[f"before: {commit}; 20 steps, fp32, the same machine"])


if __name__ == "__main__":
    main()
