"""Preflight: check devices, versions, disk, data and bandwidth of all nodes before the first step.

Every rank checks its device. One rank per node checks versions, disk and data. All ranks gather all reports and reach the same
verdict. Broken nodes stop the run; slow nodes are reported.
"""

import contextlib
import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.config.preflight import PreflightConfig
from megatron_hybrid.distributed.bandwidth import all_reduce_gb_s, between_gb_s
from megatron_hybrid.distributed.device import has_cuda, node_name
from megatron_hybrid.launch import node_checks
from megatron_hybrid.launch.environment import Launch

LEAST_FREE = 0.9
"""Share of a GPU's memory that must be free. With less, another process is using the GPU."""
SHARED_DISK_S = 15.0
"""Seconds until a file written by one node must be visible on another. NFS caches folders for seconds."""


class PreflightError(UserError):
    """Broken nodes, one line per problem."""


@dataclass
class RankReport:
    """Report of a rank. Rates are 0 or None if they were not measured."""

    rank: int
    node: str
    local_rank: int
    device: str = "CPU"
    visible: int = 0
    """Number of visible GPUs."""
    free_gib: float = 0.0
    total_gib: float = 0.0
    tflops: float = 0.0
    wrong_entries: int = 0
    """Wrong entries of a GEMM."""
    inside_gb_s: float | None = None
    between_gb_s: float | None = None
    disk_free: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the node; empty on all ranks but its first."""
    problems: list[str] = field(default_factory=list)


def preflight(
    config: PreflightConfig, launch: Launch, run_dir: Path, needed_bytes: int, read_data: Callable[[], None]
) -> list[RankReport]:
    """Check all nodes. Every rank calls it after torch.distributed is initialized. Rank 0 prints the results.

    Args:
        needed_bytes: free bytes that run_dir needs for a checkpoint.
        read_data: opens and reads the training data; raises a UserError or an OSError if it cannot.

    Raises:
        PreflightError: broken nodes, with remedies. All ranks raise the same error.
    """
    start = time.perf_counter()
    node = node_name()
    names = _gather(node)
    nodes = list(dict.fromkeys(names))
    ranks_of_nodes = [[rank for rank, name in enumerate(names) if name == each] for each in nodes]
    mine = nodes.index(node)
    report = _device_report(launch, node)
    if launch.rank == ranks_of_nodes[mine][0]:
        _check_node(report, run_dir, needed_bytes, read_data)
    _check_shared(report, run_dir, names[0], first=launch.rank == ranks_of_nodes[mine][0])
    size = (config.all_reduce_mib or (256 if has_cuda() else 4)) << 20
    report.inside_gb_s = all_reduce_gb_s(ranks_of_nodes, size)
    report.between_gb_s = between_gb_s(ranks_of_nodes, size)
    if has_cuda():
        torch.cuda.empty_cache()  # free the memory of the measurements
    reports: list[RankReport] = _gather(report)
    broken, slow = verdict(reports, config.slow_below)
    if launch.rank == 0:
        print(table(reports, time.perf_counter() - start), flush=True)
        for line in slow:
            print(f"preflight: {line}", flush=True)
    if config.slow_nodes == "stop":
        broken = broken + slow
    if broken:
        raise PreflightError("\n  ".join(["the nodes are not ready:", *broken]))
    return reports


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _device_report(launch: Launch, node: str) -> RankReport:
    free, total = node_checks.memory_gib()
    return RankReport(
        rank=launch.rank,
        node=node,
        local_rank=launch.local_rank,
        device=torch.cuda.get_device_name() if has_cuda() else "CPU",
        visible=torch.cuda.device_count() if has_cuda() else 0,
        free_gib=free,
        total_gib=total,
        wrong_entries=node_checks.wrong_gemm_entries(),
        tflops=node_checks.matmul_tflops(),
    )


def _check_node(report: RankReport, run_dir: Path, needed_bytes: int, read_data: Callable[[], None]) -> None:
    report.versions = node_checks.versions()
    report.problems += node_checks.gpu_faults()
    report.disk_free, problem = node_checks.write_probe(run_dir, report.node, needed_bytes)
    report.problems += [problem] if problem else []
    try:
        read_data()
    except (UserError, OSError) as error:
        report.problems.append(f"data: {error}")


def _check_shared(report: RankReport, run_dir: Path, first_node: str, first: bool) -> None:
    """Check that each node sees the file that the first node wrote, because all ranks write a checkpoint to one folder."""
    dist.barrier()
    if first and not report.problems and dist.get_world_size() > 1:
        deadline, wanted = time.monotonic() + SHARED_DISK_S, node_checks.probe_file(run_dir, first_node)
        while not (seen := wanted.exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not seen:
            report.problems.append(
                f"run_dir {run_dir} is not the folder that {first_node} writes to (or that cannot write there); "
                "set it to a folder of a file system that all nodes share"
            )
    dist.barrier()
    if first:
        with contextlib.suppress(OSError):  # the file was never written
            node_checks.probe_file(run_dir, report.node).unlink()


def verdict(reports: Sequence[RankReport], slow_below: float) -> tuple[list[str], list[str]]:
    """Return broken and slow nodes, as lines that begin with the node's name."""
    broken = [f"{r.node}: {problem}" for r in reports for problem in r.problems]
    for r in reports:
        where = f"{r.node}: local rank {r.local_rank} ({r.device})"
        if r.wrong_entries:
            broken.append(f"{where} gets {r.wrong_entries} entries of a GEMM wrong; exclude the node")
        if r.visible and r.free_gib < LEAST_FREE * r.total_gib:
            broken.append(
                f"{where} has {r.free_gib:.1f} of {r.total_gib:.1f} GiB free; end the other processes on it (nvidia-smi)"
            )
    broken += _counts(reports) + _versions(reports)
    slow = []
    for what, unit, values in (
        ("GEMMs", "TFLOP/s", {f"{r.node} local rank {r.local_rank}": r.tflops for r in reports}),
        ("all-reduce inside the node", "GB/s", _slowest(reports, "inside_gb_s")),
        ("all-reduce with other nodes", "GB/s", _slowest(reports, "between_gb_s")),
    ):
        for name, value in outliers(values, slow_below).items():
            middle = statistics.median(values.values())
            slow.append(f"{name}: {what} at {value:.3g} {unit}, {value / middle:.0%} of the median {middle:.3g}")
    return broken, slow


def _counts(reports: Sequence[RankReport]) -> list[str]:
    """Return the nodes whose number of GPUs or ranks differs from most nodes."""
    ranks = Counter(r.node for r in reports)
    gpus = {r.node: r.visible for r in reports}
    return [
        f"{node}: {value}, but {most} on {others}; start the same on all nodes, or exclude it (GPU off the bus?)"
        for values in (
            {node: f"{count} ranks" for node, count in ranks.items()},
            {node: f"{count} GPUs visible" for node, count in gpus.items()},
        )
        for node, value, most, others in outlying_nodes(values)
    ]


def _versions(reports: Sequence[RankReport]) -> list[str]:
    """Return the nodes with versions that differ from most nodes."""
    of_nodes = {r.node: r.versions for r in reports if r.versions}
    names = list(dict.fromkeys(name for found in of_nodes.values() for name in found))
    return [
        f"{node}: {name} {value}, but {most} on {others}; install the same everywhere"
        for name in names
        for node, value, most, others in outlying_nodes({node: v.get(name, "none") for node, v in of_nodes.items()})
    ]


def outlying_nodes[T: Hashable](values: dict[str, T]) -> list[tuple[str, T, T, str]]:
    """Return (node, its value, the most common value, nodes with that value) of every node that differs from most."""
    if len(set(values.values())) < 2:
        return []
    most = Counter(values.values()).most_common(1)[0][0]
    same = [node for node, value in values.items() if value == most]
    others = ", ".join(same[:3]) + (f" and {len(same) - 3} more" if len(same) > 3 else "")
    return [(node, value, most, others) for node, value in values.items() if value != most]


def _slowest(reports: Sequence[RankReport], attribute: str) -> dict[str, float]:
    """Return the rate of each node's slowest rank. Nodes without a measurement are left out."""
    found: dict[str, float] = {}
    for r in reports:
        value = getattr(r, attribute)
        if value is not None:
            found[r.node] = min(value, found.get(r.node, value))
    return found


def outliers(values: dict[str, float], slow_below: float) -> dict[str, float]:
    """Return the values below this share of the median."""
    if len(values) < 2:
        return {}
    middle = statistics.median(values.values())
    return {name: value for name, value in values.items() if value < slow_below * middle}


def table(reports: Sequence[RankReport], seconds: float) -> str:
    """Return the table that rank 0 prints, one line per node. A single node without GPUs needs no table."""
    inside, between = _slowest(reports, "inside_gb_s"), _slowest(reports, "between_gb_s")
    nodes = list(dict.fromkeys(r.node for r in reports))
    width = max(len("node"), *(len(node) for node in nodes))
    lines = [f"preflight: {len(nodes)} node{'s' * (len(nodes) > 1)}, {len(reports)} ranks, {seconds:.1f} s"]
    if len(nodes) > 1 or any(r.visible for r in reports):
        lines.append(f"  {'node':<{width}}  ranks  free GiB of   TFLOP/s  GB/s inside  between  disk free  device")
    for node in nodes if len(lines) > 1 else ():
        mine = [r for r in reports if r.node == node]
        free, total = min(r.free_gib for r in mine), mine[0].total_gib
        disk = next((node_checks.format_bytes(r.disk_free) for r in mine if r.disk_free is not None), "-")
        rates = [f"{rate[node]:.3g}" if node in rate else "-" for rate in (inside, between)]
        lines.append(
            f"  {node:<{width}}  {len(mine):>5}  {free:>5.1f} {total:>5.1f}   {min(r.tflops for r in mine):>7.3g}  "
            f"{rates[0]:>11}  {rates[1]:>7}  {disk:>9}  {mine[0].device}"
        )
    shown = ", ".join(f"{name} {value}" for name, value in reports[0].versions.items() if value != "none")
    return "\n".join([*lines, *textwrap.wrap(shown, 80, initial_indent="  ", subsequent_indent="  ")])
