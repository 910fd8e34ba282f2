"""Verdicts on hangs, and the limits of the watchdog. tests/faults/hangs.py stops whole ranks."""

import errno
import importlib.machinery
import json
import os
import subprocess
import sys
import types
from unittest import mock

import pytest

from megatron_hybrid.base.heartbeat import Heartbeat
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.train.watchdog import collective_timeout, thread
from megatron_hybrid.train.watchdog.flight_recorder import Collectives, GroupState
from megatron_hybrid.train.watchdog.nvrx import RankMonitor
from megatron_hybrid.train.watchdog.report import Report, read_reports
from megatron_hybrid.train.watchdog.thread import Limits, Watchdog
from megatron_hybrid.train.watchdog.verdict import verdict
from testing import checkpoints

HOSTS = {0: "a", 1: "a", 2: "b"}


def report(rank: int, step: int = 7, entered: int = 3, waits: bool = True, communicates: bool = True) -> Report:
    group = GroupState([0, 1, 2], entered, "all_reduce [4]", waits)
    collectives = Collectives({"0": group}, {"0": "DATA_PARALLEL_GROUP"})
    return Report(
        rank,
        HOSTS[rank],
        step,
        f"running step {step + 1}",
        "data/loader.py:9 (_take)",
        communicates,
        "",
        "",
        collectives,
    )


def test_a_silent_rank_is_named_with_its_host():
    text = verdict({0: report(0), 1: report(1)}, HOSTS)
    assert text == (
        "rank 2 on b sent no report: stopped, ended, or on a host that is down; "
        "ranks 0, 1 wait in all_reduce [4] (number 3 of DATA_PARALLEL_GROUP)"
    )


def test_the_rank_that_has_not_entered_the_collective_is_named():
    text = verdict({0: report(0), 1: report(1, entered=2, waits=False), 2: report(2)}, HOSTS)
    assert text.startswith(
        "rank 1 on a lags: it is running step 8, at data/loader.py:9 (_take), and has not entered all_reduce [4] "
        "(number 3 of DATA_PARALLEL_GROUP); ranks 0, 2 wait"
    )


def test_without_records_the_rank_outside_of_communication_is_named():
    reports = {rank: report(rank, waits=False, communicates=rank != 2) for rank in HOSTS}
    assert verdict(reports, HOSTS).startswith(
        "rank 2 on b lags: it is running step 8, at data/loader.py:9 (_take), and waits for no"
    )


def test_the_rank_with_fewer_steps_is_named():
    reports = {rank: report(rank, step=6 if rank == 0 else 7, waits=False) for rank in HOSTS}
    assert "rank 0 on a lags" in verdict(reports, HOSTS) and "has finished step 6 only" in verdict(reports, HOSTS)


def test_nobody_is_blamed_without_a_difference():
    assert verdict({rank: report(rank) for rank in HOSTS}, HOSTS).startswith("no rank lags: all have finished step 7")


def test_reports_are_exchanged_through_files(tmp_path):
    report(1).write(tmp_path / "hangs")
    found = {0: report(0)}
    read_reports(tmp_path / "hangs", found)
    assert found == {0: report(0), 1: report(1)}


@pytest.mark.parametrize(
    ("step", "longest", "expected"),
    [(None, 0.1, 600.0), (None, 100.0, 1000.0), (None, 900.0, 1500.0), (20.0, 900.0, 20.0)],
)
def test_limits(monkeypatch, step, longest, expected):
    beat = Heartbeat()
    monkeypatch.setattr(thread, "heartbeat", beat)
    limits = Limits(step, start=77.0)
    assert limits.now() == 77.0, "before the first step has ended"
    beat.begin_step(0)
    beat.end_step(1)
    beat.longest_step = longest
    assert limits.now() == expected


def test_the_first_step_does_not_count_once_there_is_another(monkeypatch):
    beat, times = Heartbeat(), iter([0.0, 100.0, 100.0, 101.0, 101.0, 103.0, 103.0, 104.0])
    monkeypatch.setattr("megatron_hybrid.base.heartbeat.time.monotonic", lambda: next(times))
    longest = []
    for step in range(4):
        beat.begin_step(step)
        beat.end_step(step + 1)
        longest.append(beat.longest_step)
    assert longest == [100.0, 1.0, 2.0, 2.0]


def test_collectives_wait_longer_than_the_watchdog():
    train = {"steps": 1, "global_batch_size": 1}
    assert collective_timeout(TrainConfig(**train)) == 30
    assert collective_timeout(TrainConfig(**train, hang_timeout=3600.0)) == 120


def test_the_field_of_the_limit_is_named(monkeypatch):
    beat = Heartbeat()
    monkeypatch.setattr(thread, "heartbeat", beat)
    assert Limits().field == "train.start_timeout"
    beat.begin_step(0)
    beat.end_step(1)
    assert Limits().field == "train.hang_timeout"


class UnreadableFolder:
    def __truediv__(self, name):
        return self

    def exists(self):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_a_folder_that_cannot_be_read_holds_no_report():
    watchdog = Watchdog(UnreadableFolder(), Limits(), ends_process=False)
    watchdog.team = types.SimpleNamespace(size=2, token="hang")
    assert not watchdog._others_report()


def test_a_watchdog_that_fails_does_not_end_the_run_later(tmp_path, monkeypatch):
    timer = mock.Mock()
    monkeypatch.setattr(thread, "ExitTimer", lambda *_: timer)
    monkeypatch.setattr(thread, "_TICK_S", 0.0)
    watchdog = Watchdog(tmp_path, Limits())
    monkeypatch.setattr(watchdog, "_look", mock.Mock(side_effect=[None, KeyError]))
    with pytest.raises(KeyError):
        watchdog.run()
    assert [call[0] for call in timer.method_calls] == ["set", "cancel"]


def test_ranks_that_wait_see_the_progress_of_others(ranks):
    waiting, working = ranks.run(checkpoints.beats_while_others_work, 2, seconds=3.5)
    assert waiting >= 3 and working > waiting


def test_the_exit_timer_needs_no_gil(root):
    program = (
        "import ctypes, sys\nfrom megatron_hybrid.train.watchdog.last_resort import ExitTimer\n"
        "timer = ExitTimer(75, sys.stderr)\ntimer.set(1.5)\nctypes.PyDLL(None).sleep(60)  # holds the GIL\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=50)
    assert done.returncode == 75 and 'File "<string>", line 5' in done.stderr


def test_collectives_are_read_from_the_flight_recorder(ranks):
    results = ranks.run(recorded, 2)
    assert [result["entered"] for result in results] == [1, 1]
    assert all("all_reduce" in result["operation"] and result["ranks"] == [0, 1] for result in results)


def recorded() -> dict:
    """Run one collective in a group with a name, and return what is recorded about it."""
    import torch
    import torch.distributed as dist

    group = dist.new_group([0, 1], backend="gloo", group_desc="OURS")
    dist.all_reduce(torch.ones(3), group=group)
    found = Collectives.of_this_rank()
    json.dumps(found.as_json())
    (name,) = [name for name, text in found.descriptions.items() if text == "OURS"]
    state = found.groups[name]
    return {"entered": state.entered, "operation": state.operation, "ranks": state.ranks}


class MonitorClient:
    """Stand-in for the RankMonitorClient of NVRx, with the limits of some sections."""

    def __init__(self, sections: tuple[str, ...] = ()) -> None:
        self.cfg, self.sent = types.SimpleNamespace(rank_section_timeouts=dict.fromkeys(sections, 10.0)), list[str]()

    def init_workload_monitoring(self) -> None:
        self.sent.append("init")

    def shutdown_workload_monitoring(self) -> None:
        self.sent.append("shutdown")

    def start_section(self, name: str) -> None:
        self.sent.append(f"start {name}")

    def end_section(self, name: str) -> None:
        self.sent.append(f"end {name}")

    def send_heartbeat(self) -> None:
        self.sent.append("beat")


def test_ft_launcher_hears_of_progress(monkeypatch, tmp_path):
    """The first heartbeat follows the first step, and a failure of the monitor ends nothing."""
    client, beat = MonitorClient(), Heartbeat()
    monkeypatch.setattr(thread, "heartbeat", beat)
    watchdog = thread.Watchdog(tmp_path, Limits(), RankMonitor(client), ends_process=False)
    watchdog._look(1.0, 600.0)
    beat.begin_step(0)
    watchdog._look(2.0, 600.0)
    assert client.sent == [], "kernels are compiled in the first step"
    beat.end_step(1)
    for now in (3.0, 4.0):
        watchdog._look(now, 600.0)
    assert client.sent == ["beat"], "there was no progress since then"
    with beat.doing("saving", progress=lambda: None):
        watchdog._look(10.0, 600.0)
        beat.progress = lambda: "a file that grows"
        watchdog._look(100.0, 600.0)
    assert client.sent == ["beat"] * 3, "what others write is progress too"
    monkeypatch.setattr(client, "send_heartbeat", lambda: 1 / 0)
    beat.beat()
    watchdog._look(101.0, 600.0)


def test_sections_of_ft_launcher(monkeypatch, tmp_path):
    """A section begins again at every sign of progress. Sections without a limit are not named: NVRx 0.4 fails on them."""
    client, beat = MonitorClient(("setup", "step")), Heartbeat()
    monitor = RankMonitor(client)
    monkeypatch.setattr(thread, "heartbeat", beat)
    watchdog = thread.Watchdog(tmp_path, Limits(), monitor, ends_process=False)
    watchdog._look(1.0, 600.0)
    beat.begin_step(0)
    watchdog._look(2.0, 600.0)
    beat.beat()
    watchdog._look(3.0, 600.0)
    with beat.doing("saving", section="checkpointing"):
        watchdog._look(4.0, 600.0)
    assert client.sent == ["start setup", "end setup", "start step", "end step", "start step", "end step"]
    monitor.close()
    assert client.sent[-1] == "shutdown"


def test_only_ranks_of_ft_launcher_connect(monkeypatch):
    for name in ("nvidia_resiliency_ext", "nvidia_resiliency_ext.fault_tolerance"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    package = sys.modules["nvidia_resiliency_ext.fault_tolerance"]
    monkeypatch.setattr(package, "RankMonitorClient", MonitorClient, raising=False)
    assert RankMonitor.connect() is None
    monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", "socket")
    monitor = RankMonitor.connect()
    assert monitor is not None and monitor._client.sent == ["init"]
