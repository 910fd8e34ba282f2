"""The watchdog thread: detects that the main thread makes no progress, reports, and ends the process so that the job requeues.

Every rank detects a hang by itself, because every step waits for all ranks. No messages are sent while the run makes progress. After a
hang, the ranks exchange reports through files in `run_dir/hangs`, since a rank that is stopped may be the one that holds
torch.distributed's store.
"""

import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid.base.errors import REQUEUE
from megatron_hybrid.base.heartbeat import heartbeat
from megatron_hybrid.observe.outputs import Output
from megatron_hybrid.train.watchdog.last_resort import ExitTimer
from megatron_hybrid.train.watchdog.nvrx import RankMonitor
from megatron_hybrid.train.watchdog.report import Report, read_reports
from megatron_hybrid.train.watchdog.team import Team
from megatron_hybrid.train.watchdog.verdict import verdict

STEPS, FLOOR_S, CEILING_S = 10, 600.0, 1500.0
"""Default limit: this many times the longest step, within these bounds. Collectives fail by themselves after 1800 s."""
START_S = 1800.0
"""Default limit until the first step has ended."""
WINDOW_S = 4.0
"""Seconds to wait for reports of other ranks."""
_TICK_S, _LONGEST_TICK_S = 0.5, 5.0
_LAST_RESORT_S = WINDOW_S + 4.0


@dataclass(frozen=True)
class Limits:
    """Seconds without progress after which the run has hung."""

    step: float | None = None
    """None: the default, by the longest step."""
    start: float = START_S
    """Until the first step has ended."""

    def now(self) -> float:
        """Return the limit that applies now."""
        if not heartbeat.has_trained:
            return self.start
        return self.step or min(max(FLOOR_S, STEPS * heartbeat.longest_step), CEILING_S)

    @property
    def field(self) -> str:
        """Field that sets the limit that applies now."""
        return "train.hang_timeout" if heartbeat.has_trained else "train.start_timeout"


class Watchdog(threading.Thread):
    """Thread that watches the heartbeat of this process. A context manager.

    Args:
        folder: folder for reports, `run_dir/hangs`.
        monitor: another monitor, told of progress.
        ends_process: False: report a hang, but leave it to the other monitor to end the process.
    """

    def __init__(
        self, folder: Path, limits: Limits, monitor: RankMonitor | None = None, ends_process: bool = True
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.folder, self.limits, self.monitor, self.ends_process = folder, limits, monitor, ends_process
        self.team = Team.alone()
        self._ended = threading.Event()
        self._timer = ExitTimer(REQUEUE, sys.__stderr__ or sys.stderr) if ends_process else None
        self._forwarding = Output("progress for the other monitor", _say, waits=True)
        self._age, self._beats = 0.0, -1
        self._progress: object = None
        self._next_look = 0.0

    def join_team(self) -> None:
        """Learn the other ranks' hosts. Every rank calls it, once the process groups are formed."""
        self.team = Team.of_all_ranks()

    def __enter__(self) -> "Watchdog":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self.join()
        if self.monitor is not None:
            self._forwarding.attempt(self.monitor.close)

    def run(self) -> None:
        """Watch until the run ends. Without this thread, nothing would set the timer back, so it ends with the thread."""
        try:
            self._watch()
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _watch(self) -> None:
        """Only time in which this thread runs counts: a suspended process has not hung."""
        last = time.monotonic()
        while not self._ended.wait(_TICK_S):
            now = time.monotonic()
            self._age += min(now - last, _LONGEST_TICK_S)
            last = now
            limit = self.limits.now()
            self._look(now, limit)
            if self._timer is not None:
                self._timer.set(limit - self._age + _LAST_RESORT_S)
            if self._age > limit or (self._age > limit / 2 and self._others_report()):
                self._end(limit)

    def _look(self, now: float, limit: float) -> None:
        """Set the age to zero if the main thread, or the processes that it waits for, have made progress."""
        if heartbeat.beats != self._beats:
            self._beats = heartbeat.beats
            self._progressed()
        progress = heartbeat.progress
        if progress is not None and now > self._next_look:
            self._next_look = now + min(max(limit / 20, 1.0), 30.0)
            with contextlib.suppress(OSError):  # what cannot be read shows no progress
                if (seen := progress()) != self._progress:
                    self._progress = seen
                    self._progressed()

    def _progressed(self) -> None:
        self._age = 0.0
        if self.monitor is not None:
            section, has_trained, report = heartbeat.section, heartbeat.has_trained, self.monitor.report
            self._forwarding.attempt(lambda: report(section, has_trained))

    def _others_report(self) -> bool:
        with contextlib.suppress(OSError):  # what cannot be read is no report
            return self.team.size > 1 and (self.folder / self.team.token).exists()
        return False

    def _end(self, limit: float) -> None:
        """Report, and end the process without exit handlers, which would wait for the other ranks."""
        report = Report.of_this_rank(self.team.rank, self.team.host)
        _say(f"no progress for {self._age:.0f} s (limit {limit:.0f} s; {self.limits.field}): {report.text()}")
        reports = {report.rank: report}
        exchange = threading.Thread(target=self._exchange, args=(report, reports), daemon=True)
        exchange.start()
        exchange.join(WINDOW_S)  # the file system may be what hangs
        known = dict(reports)
        if report.rank == min(known):
            _say(
                f"the run hangs: {verdict(known, self.team.hosts)}. Stacks of all threads are in {self._report_folder}"
            )
        if self.ends_process:
            self.team.kill_on_this_host(set(self.team.hosts) - set(known))
            os._exit(REQUEUE)
        self._age = -limit  # the other monitor ends the process; report again if it does not

    @property
    def _report_folder(self) -> Path:
        return self.folder / self.team.token

    def _exchange(self, report: Report, reports: dict[int, Report]) -> None:
        """Write the report, and collect those of the other ranks."""
        try:
            report.write(self._report_folder)
            while len(reports) < self.team.size:
                time.sleep(0.1)
                read_reports(self._report_folder, reports)
        except OSError as error:
            _say(f"reports of other ranks cannot be exchanged: {error}")


def _say(text: str) -> None:
    """Write to stderr without Python's buffers, whose lock another thread may hold."""
    data = f"pretrain: {text}\n".encode()
    while data:
        try:
            data = data[os.write(2, data) :]
        except OSError:  # nobody reads it
            return
