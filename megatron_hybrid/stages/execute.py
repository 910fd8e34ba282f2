"""Runs the stages on this machine, one command after the other, or submits them to SLURM as jobs that depend on each other."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_hybrid.base.command import process_arguments
from megatron_hybrid.base.errors import REQUEUE, UserError
from megatron_hybrid.observe.outputs import Output
from megatron_hybrid.stages.config import SlurmConfig
from megatron_hybrid.stages.plan import Average, Training, Work

ROOT = Path(__file__).resolve().parents[2]
"""Folder of the checkout, with examples/; of no use where the package is installed without it."""


class StagesError(UserError):
    """A stage cannot run, or did not end as it should."""


def local_command(item: Work, launcher: Sequence[str]) -> list[str]:
    """Return the command of a run or an average on this machine.

    Args:
        launcher: options of `megatron-hybrid launch`, such as `--cpu-ranks 2`.
    """
    if isinstance(item, Average):
        return process_arguments(["average", *item.arguments])
    return process_arguments(["launch", *launcher, "pretrain", str(item.config_file), *item.arguments])


def run_all(work: Sequence[Work], launcher: Sequence[str], after: Callable[[], None]) -> int:
    """Run what is not done yet, and return the status of the first command that fails, or 0.

    After a request to stop, which goes to the running command, no further command starts.

    Args:
        after: called after each command that succeeded. Its failures are printed.

    Returns:
        REQUEUE, if a request to stop came and stages are left.

    Raises:
        StagesError: a command succeeded, and its stage is not done.
    """
    plot = Output("the plot of the stages", print)
    with _stop_requests() as requests:
        for item in work:
            if item.done:
                print(f"{item.name}: done", flush=True)
                continue
            if requests.came:
                print(f"{item.name}: not started, after a request to stop", file=sys.stderr)
                return REQUEUE
            print(f"{item.name}: {item.state}, starts", flush=True)
            status = requests.run(local_command(item, launcher))
            if status:
                print(f"{item.name}: ended with status {status}; run the same command again to resume", file=sys.stderr)
                return status
            if not item.done:
                raise StagesError(
                    f"{item.name}: its command succeeded and left no last checkpoint; see its output above"
                )
            plot.attempt(after)
    return 0


class _StopRequests:
    """Requests to stop: SIGTERM, SIGUSR1 and Ctrl-C."""

    def __init__(self) -> None:
        self.came = False
        self._process: subprocess.Popen[bytes] | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Forward a signal to the running command. A terminal sends Ctrl-C to it as well."""
        self.came = True
        if self._process is not None and number != signal.SIGINT:
            self._process.send_signal(number)

    def run(self, command: list[str]) -> int:
        """Run a command and return its exit status."""
        with subprocess.Popen(command) as self._process:
            if self.came:  # before the process was known
                self._process.send_signal(signal.SIGTERM)
            status = self._process.wait()
        self._process = None
        return 128 - status if status < 0 else status


@contextmanager
def _stop_requests() -> Iterator[_StopRequests]:
    requests = _StopRequests()
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, requests.handle) for number in numbers}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def submission(item: Work, slurm: SlurmConfig, jobs: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the environment variables and the command that submit a run or an average.

    Args:
        jobs: job number, or a shell variable with it, of each item that is submitted already. Others are done.
    """
    needed = [jobs[name] for name in item.needs if name in jobs]
    dependency = [f"--dependency=afterok:{':'.join(needed)}", "--kill-on-invalid-dep=yes"] if needed else []
    common = ["sbatch", "--parsable", f"--job-name={item.name}", *dependency]
    if isinstance(item, Training):
        script = [slurm.script, *item.arguments]
        return {"CONFIG": str(item.config_file.resolve())}, [*common, *slurm.options, *item.slurm, *script]
    return {}, [*common, *slurm.average_options, f"--wrap={shlex.join(local_command(item, ()))}"]


def submit_all(work: Sequence[Work], slurm: SlurmConfig) -> None:
    """Submit what is not done yet, each job after those that it needs, and print the job numbers.

    Raises:
        StagesError: there is no batch script, or sbatch refused a job. Jobs that were submitted before it stay in the queue.
    """
    if not (ROOT / slurm.script).is_file():
        raise StagesError(
            f"slurm.script: {ROOT / slurm.script} does not exist; give the path of a batch script, such as a copy of "
            "examples/pretrain_hybrid_7b.sh from the source"
        )
    jobs: dict[str, str] = {}
    for item in work:
        if item.done:
            continue
        variables, command = submission(item, slurm, jobs)
        done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
        if done.returncode:
            queued = f"; cancel {' '.join(jobs.values())} before you submit again" if jobs else ""
            raise StagesError(f"{item.name}: {done.stderr.strip()[:2000]}{queued}")
        jobs[item.name] = done.stdout.strip().partition(";")[0]
        print(f"{item.name}: job {jobs[item.name]}", flush=True)


def shell_script(work: Sequence[Work], slurm: SlurmConfig) -> list[str]:
    """Return the submissions of what is not done yet as lines of a shell script."""
    jobs: dict[str, str] = {}
    lines = [f"cd {shlex.quote(str(ROOT))}"]
    for item in work:
        if item.done:
            continue
        variables, command = submission(item, slurm, jobs)
        assigned = "".join(f"{name}={shlex.quote(value)} " for name, value in variables.items())
        variable = item.name.replace("-", "_")
        words = (f'"{word}"' if word.startswith("--dependency") else shlex.quote(word) for word in command)
        lines.append(f"job_{variable}=$({assigned}{' '.join(words)})")
        jobs[item.name] = f"$job_{variable}"
    return lines
