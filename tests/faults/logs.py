"""Failing outputs of the log: the run reaches its last step, and reports each failure once."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import run_state
from tests.faults.processes import Forked

STEPS = 20


def _no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _after(owner: Any, name: str, calls: int, until: int = 10**9) -> None:
    """Make a function fail from one call to another."""
    original, seen = getattr(owner, name), [0]

    def write(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        return _no_space() if calls < seen[0] <= until else original(*args, **kwargs)

    setattr(owner, name, write)


def _metrics(run_dir: Path) -> None:
    _after(os, "pwrite", 6, 12)


def _tensorboard(run_dir: Path) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    _after(RecordWriter, "write", 30)


def _plot(run_dir: Path) -> None:
    from matplotlib.figure import Figure

    Figure.savefig = _no_space  # type: ignore[method-assign]


def _console(run_dir: Path) -> None:
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)


def _folder(run_dir: Path) -> None:
    from megatron_hybrid.train.trainer import Trainer

    original = Trainer.step

    def step(self: Any) -> Any:
        if self.progress.step == 5:
            shutil.rmtree(run_dir)
        return original(self)

    Trainer.step = step  # type: ignore[method-assign]


CASES: tuple[tuple[str, Callable[[Path], None], str, list[int]], ...] = (
    ("metrics.jsonl, for a while", _metrics, "metrics.jsonl cannot be written", list(range(1, STEPS + 1))),
    ("TensorBoard", _tensorboard, "TensorBoard cannot be written", list(range(1, STEPS + 1))),
    ("loss.png", _plot, "loss.png cannot be written", list(range(1, STEPS + 1))),
    ("stdout is a closed pipe", _console, "stdout cannot be written", list(range(1, STEPS + 1))),
    ("the folder is removed", _folder, "metrics.jsonl cannot be written", list(range(6, STEPS + 1))),
)
"""What fails, the fault, what is printed once, and the steps in metrics.jsonl at the end."""


def run(part: Any, count: int) -> None:
    """Run the first `count` cases."""
    for number, (what, fault, says, steps) in enumerate(CASES[:count]):
        run_dir = part.folder / str(number)
        fields = {"logging.tensorboard": "true", "logging.plot_interval": 8}
        arguments = run_state.arguments(part.folder, run_dir, "one rank", STEPS, STEPS, **fields)
        ranks = Forked(arguments, 1, part.folder / "log", lambda rank, fault=fault, run_dir=run_dir: fault(run_dir))
        codes, text = ranks.wait(90), ranks.text()
        part.expect(codes == [0], f"{what}: {codes} {text[-500:]}")
        part.expect(text.count(says) == 1, f"{what}: reported {text.count(says)} times: {text[-500:]}")
        part.expect(run_state.saved_step(run_dir) == STEPS, f"{what}: the last step is not saved")
        logged = [step for step, *_ in run_state.outcome(run_dir)["curve"]]
        part.expect(logged == steps, f"{what}: steps in metrics.jsonl: {logged}")
