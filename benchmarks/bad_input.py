"""CPU time until bad input is refused: hostile files of every format, and a wrong configuration.

python benchmarks/bad_input.py           a minute on an idle machine

The files are those of tests/hostile, each read in a forked process; for each test, the slowest of its files. Writes
benchmarks/results/bad_input-cpu.json.
"""

import os
import resource
import subprocess
import sys
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from statistics import median

import pytest
from report import bounded, write

ROOT = Path(__file__).resolve().parents[1]
REPETITIONS = 5
WRONG = [sys.executable, "tools/pretrain.py", "examples/configs/pretrain_hybrid_tiny.yaml", "train.optimzer.lr=1"]
IMPORT = [sys.executable, "-c", "import megatron_hybrid.config.load"]


def children_seconds() -> float:
    """Return the CPU time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Times:
    """A pytest plugin that measures the CPU time of each test's child processes."""

    def __init__(self) -> None:
        self.seconds = defaultdict[str, list[float]](list)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        before = children_seconds()
        result = yield
        self.seconds[item.name.partition("[")[0]].append(children_seconds() - before)
        return result


def of_command(command: list[str], status: int) -> float:
    """Return the median CPU time of a command that ends with `status`."""
    seconds = []
    for _ in range(REPETITIONS):
        before = children_seconds()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        seconds.append(children_seconds() - before)
    return median(seconds)


def main() -> None:
    os.chdir(ROOT)
    times = Times()
    if pytest.main(["-q", "-p", "no:cacheprovider", "tests/hostile"], plugins=[times]):
        sys.exit("tests/hostile failed: no result is written")
    del times.seconds["test_the_limits_are_in_force"]  # it uses its time up
    figures = {
        f"{name.removeprefix('test_').replace('_', ' ')}, slowest of {len(seconds)}": (max(seconds), 1)
        for name, seconds in times.seconds.items()
    }
    figures["an unknown field in the configuration, whole command"] = (of_command(WRONG, 78), 2)
    figures["import of the configuration, whole process"] = (of_command(IMPORT, 0), 0.5)
    rows = [bounded(case, "CPU time", "s", seconds, goal) for case, (seconds, goal) in figures.items()]
    write("bad_input", rows, ("torch", "pydantic", "pyyaml"))


if __name__ == "__main__":
    main()
