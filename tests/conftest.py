"""Settings of all tests: one thread per process, markers by folder, and skips where the hardware is missing."""

import gc
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

# Before torch is imported anywhere: tests are small, and those that start ranks fill the cores with processes. One
# thread also fixes the order of summation, on which bit-exact comparisons rest.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
# Scripts that tests start use the environment in which the tests run, and make no other one.
os.environ.setdefault("HYBRID_EXTRAS", "dev")
# More ranks than cores: a process that is woken waits for its turn, where by default it would interrupt the rank whose
# message woke it. All that tests start inherits it. Four ranks on two cores gather in 1.0 ms, and not in 3.1.
with suppress(OSError):  # a sandbox may not have it
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

# A shell starts background jobs with SIGINT ignored, and a process that begins so keeps it. Tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
BY_FOLDER = ("gpu", "slurm", "distributed")
NO_CUDA = "no CUDA device here"


@cache
def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_sbatch() -> bool:
    return shutil.which("sbatch") is not None


# Files that take longest, the longest first, so that none of them is begun last. Where files are shared among workers
# (tests/run.sh), each is one unit. Take the order from `--durations` when it has changed.
LONGEST = (
    "slurm/test_example.py",
    "kernels/test_triton_interpreted.py",
    "distributed/test_deepspeed.py",
    "planner/test_command.py",
    "faults/test_runs.py",
    "slurm/test_stages.py",
    "distributed/test_same_curve.py",
    "examples/test_scaling_ladder.py",
    "faults/test_saves.py",
    "test_example_tiny.py",
    "stages/test_interrupted.py",
    "kernels/test_compile_for_hopper.py",
    "evaluation/test_tasks.py",
    "kernels/test_cuda_scan.py",
    "distributed/test_shared_gpu.py",
    "distributed/test_repetitions.py",
    "distributed/test_muon_curves.py",
    "train/test_cuda_graphs.py",
    "launch/test_environment.py",
    "tools/test_commands.py",
    "launch/test_preflight.py",
    "hostile/test_bounds.py",
    "convert/test_safety.py",
    "kernels/test_cuda_scans_on_cpu.py",
    "inference/test_generate.py",
    "distributed/test_document_layouts.py",
    "distributed/test_host_offload.py",
    "distributed/test_resume.py",
    "examples/test_scaling_law.py",
    "examples/test_scaling_corpus.py",
    "mixers/test_plugin.py",
    "convert/test_trained.py",
    "convert/test_streaming.py",
    "convert/test_transformers_versions.py",
)
NEEDS = {"gpu": (_has_cuda, NO_CUDA), "slurm": (_has_sbatch, "no sbatch here")}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder in BY_FOLDER:
            item.add_marker(folder)
    if hasattr(config, "workerinput"):
        places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collectstart() -> None:
    gc.disable()  # it would traverse several times what test modules import


def pytest_collection_finish() -> None:
    gc.freeze()  # what all test modules have imported: no collection looks through it again, also in forked processes
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests whose hardware is missing before pytest looks at what else they lack, such as Transformer Engine."""
    for marker, (is_here, reason) in NEEDS.items():
        if item.get_closest_marker(marker) and not is_here():  # torch is asked for a device only when a test needs one
            pytest.skip(reason)


def skips_by_reason(reports: Iterable[pytest.TestReport]) -> Counter[str]:
    """Count skipped tests by the reason, most frequent first."""
    found: Counter[str] = Counter()
    for report in reports:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        found[reason.removeprefix("Skipped: ")] += 1
    return Counter(dict(found.most_common()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the reasons of skipped tests, instead of a line for each of several hundred."""
    found = skips_by_reason(terminalreporter.stats.get("skipped", []))
    if found:
        terminalreporter.section("skipped tests by reason")
        for reason, count in found.items():
            terminalreporter.line(f"{count:5}  {reason}")
        others = sum(count for reason, count in found.items() if reason != NO_CUDA)
        terminalreporter.line(f"{found[NO_CUDA]} of {found.total()} need a GPU, {others} something else")


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def ranks():
    """`ranks.run(function, world_size, **kwargs)`: the function on that many gloo ranks (testing/ranks.py)."""
    from testing.ranks import RankPool

    return RankPool()
