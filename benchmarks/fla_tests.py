"""fla's own tests of the gated delta rule with our kernels: in place of fla's function, and through fla's backend registry.

python benchmarks/fla_tests.py FILE         on one GPU, 5 minutes
    --workers N   processes of pytest-xdist   --select EXPRESSION   pytest's -k   --cases NAME ...

FILE is tests/ops/test_gdn.py of a checkout of flash-linear-attention 0.6 (tests/gpu/run_fla_tests.py).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]
CASES = {
    # name: (arguments, environment)
    "fp16": ([], {}),
    "bf16": (["--bf16"], {}),
    "registry": (["--registry"], {}),
    "fla alone": (["--registry"], {"FLA_HYBRID_KERNELS": "0"}),
}
FILE = "fla's tests/ops/test_gdn.py"
Outcomes = dict[str, tuple[str, bool]]


def outcomes(name: str, options: argparse.Namespace) -> Outcomes:
    """Run the tests. Return the outcome of each by its name, and whether it ran our kernels."""
    arguments, more = CASES[name]
    selection = (["-k", options.select] if options.select else []) + ["-n", str(options.workers)] * (
        options.workers > 1
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "outcomes.json"
        command = [sys.executable, "-m", "tests.gpu.run_fla_tests", str(options.file.resolve()), *arguments]
        done = subprocess.run(
            [*command, "--out", str(result), "--timeout", "0", *selection],
            cwd=ROOT, env=os.environ | more | {"PYTHONPATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        print(f"{name}: status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-1000:]}", flush=True)
        if not result.exists():
            raise SystemExit(f"{name}: the tests did not run")
        return {test: tuple(found) for test, found in json.loads(result.read_text())["tests"].items()}


def rows(found: dict[str, Outcomes]) -> Iterator[dict]:
    """Return the rows of all cases that were run."""
    from report import bounded, row

    for name, kernels in (("fp16", "Triton"), ("bf16", "Hopper")):
        if name in found:
            passed, total = _passed(found[name]), len(found[name])
            case = f"{FILE}, those that call chunk_gated_delta_rule, in {name} by our {kernels} kernels"
            yield row(case, f"passed with ours in its place, of {total} run", "tests", passed) | _goal(passed, total)
    if "registry" not in found:
        return
    ours = {name: outcome for name, outcome in found["registry"].items() if outcome[1]}
    case = f"{FILE}, those that call chunk_gated_delta_rule, with hybrid_kernels in fla's registry"
    passed, total = _passed(ours), len(ours)
    yield row(case, f"passed, of {total} that ran our kernels", "tests", passed) | _goal(passed, total)
    if "fla alone" in found:
        alone = found["fla alone"]
        worse = _failed(found["registry"]) - _failed(alone)
        yield bounded(case, "failed, and do not in fla alone", "tests", len(worse), 0)
        for title, run in (("with hybrid_kernels", found["registry"]), ("in fla alone", alone)):
            yield row(f"{FILE}, the same", f"failed {title}, of {len(run)}", "tests", len(_failed(run)))


def _failed(found: Outcomes) -> set[str]:
    return {test for test, (outcome, _) in found.items() if outcome == "failed"}


def _passed(found: Outcomes) -> int:
    return sum(outcome == "passed" for outcome, _ in found.values())


def _goal(passed: int, total: int) -> dict:
    return {"goal": total, "met": passed == total > 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--select")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options, _ = parser.parse_known_args()
    import torch
    from report import write

    found = {name: outcomes(name, options) for name in options.cases}
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    notes = ["fla's references and tolerances. Its tolerances are meant for fp16."]
    for name in sorted(found.keys() & {"registry", "fla alone"}):
        if failed := _failed(found[name]):
            notes.append(f"{name}: failed: {', '.join(sorted(failed))}")
    packages = ("torch", "triton", "flash-linear-attention", "tilelang")
    write("fla_tests", list(rows(found)), packages, machine, notes)


if __name__ == "__main__":
    main()
