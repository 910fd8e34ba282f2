"""Names the ranks that hold up a run that hangs."""

from collections.abc import Mapping

from megatron_hybrid.train.watchdog.report import Report

_MOST_RANKS = 8
"""Ranks to name one by one."""


def verdict(reports: Mapping[int, Report], hosts: Mapping[int, str]) -> str:
    """Return the ranks that lag, and what the others wait for.

    Args:
        reports: reports of the ranks that could send one.
        hosts: host of every rank.
    """
    silent = sorted(set(hosts) - set(reports))
    waiting = _waiting(reports)
    if silent:
        names = _names(silent, hosts)
        return f"{names} sent no report: stopped, ended, or on a host that is down; {waiting}"
    if behind := _behind(reports):
        return f"{behind}; {waiting}"
    first = min(report.step for report in reports.values())
    early = sorted(rank for rank, report in reports.items() if report.step == first)
    busy = [rank for rank in early if not reports[rank].communicates]
    if busy and len(busy) < len(reports):
        return f"{_places(busy, reports)}, and waits for no other rank; {waiting}"
    if len(early) < len(reports):
        return f"{_places(early, reports)}, and has finished step {first} only; {waiting}"
    return f"no rank lags: all have finished step {first} and have entered the same collectives; {waiting}"


def _behind(reports: Mapping[int, Report]) -> str:
    """Name the ranks that have not entered a collective in which other ranks of the same group wait."""
    for waiter in reports.values():
        for name, group in waiter.collectives.groups.items():
            if not group.waits:
                continue
            late = [
                rank
                for rank in group.ranks
                if rank in reports and _entered(reports[rank], name) < group.entered and rank != waiter.rank
            ]
            if late:
                label = waiter.collectives.label(name)
                return f"{_places(late, reports)}, and has not entered {group.operation} (number {group.entered} of {label})"
    return ""


def _entered(report: Report, name: str) -> int:
    group = report.collectives.groups.get(name)
    return group.entered if group else 0


def _waiting(reports: Mapping[int, Report]) -> str:
    """Return the last collective of the ranks that wait in one."""
    by_collective: dict[str, list[int]] = {}
    for rank, report in sorted(reports.items()):
        for collective in report.collectives.waiting():
            by_collective.setdefault(collective, []).append(rank)
    if not by_collective:
        return "no rank waits in a recorded collective"
    return "; ".join(f"{_numbers(ranks)} in {what}" for what, ranks in by_collective.items())


def _numbers(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} waits"
    shown = ", ".join(map(str, ranks[:_MOST_RANKS]))
    return f"ranks {shown}{f' and {len(ranks) - _MOST_RANKS} more' if len(ranks) > _MOST_RANKS else ''} wait"


def _names(ranks: list[int], hosts: Mapping[int, str]) -> str:
    shown = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:_MOST_RANKS])
    return shown + (f" and {len(ranks) - _MOST_RANKS} more" if len(ranks) > _MOST_RANKS else "")


def _places(ranks: list[int], reports: Mapping[int, Report]) -> str:
    """Return the place of the first of several ranks, and the numbers of the others."""
    first = reports[ranks[0]]
    others = f" (as do {_numbers(ranks[1:]).removesuffix(' wait').removesuffix(' waits')})" if len(ranks) > 1 else ""
    return f"{first.name} lags{others}: it is {first.activity}, at {first.place}"
