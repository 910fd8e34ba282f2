"""From measured points (profiling/device_rates.py) to the rates of a hardware file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from megatron_hybrid.arch.costs import Direction, Gemm, MemoryWork, attention_flops
from megatron_hybrid.arch.fp8_recipes import FP8_SPEEDUP
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import mixer_spec
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.planner.fit import fit_nonnegative
from megatron_hybrid.planner.hardware import RECURRENCE_STATE, RECURRENCE_TOKENS, Hardware, Link, Rate
from megatron_hybrid.planner.network import hops, wire_bytes
from megatron_hybrid.planner.plan import Plan

Point = Mapping[str, Any]
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "p2p")


def from_points(points: Sequence[Point], model: ModelConfig, base: Hardware, **changes: Any) -> Hardware:
    """Fit the rates of a hardware file to measured points. What was not measured stays as in `base`.

    Args:
        model: model at whose widths the points were measured.
        changes: values of other fields.
    """
    by_op = {op: list(group) for op, group in groupby(sorted(points, key=lambda p: p["op"]), key=lambda p: p["op"])}
    found: dict[str, Any] = dict(changes)
    if copies := by_op.get("copy"):
        found["copy_bytes_per_second"] = max(p["bytes"] / p["seconds"] for p in copies)
    if linear := by_op.get("linear"):
        found["linear"] = {**base.linear, **_fit(linear, _linear_work, base.peak_flops)}
    if attention := by_op.get("attention"):
        found["attention"] = {**base.attention, **_fit(attention, _attention_work, base.peak_flops)}
    if recurrence := by_op.get("recurrence"):
        found["recurrence"] = _recurrence_table(recurrence)
    copy = found.get("copy_bytes_per_second", base.copy_bytes_per_second)
    names = dict.fromkeys(work.operation for work in _memory_work(model, 1, "forward"))
    measured = {name: _efficiency(by_op[name], model, copy) for name in names if name in by_op}
    found["copy_efficiency"] = {**base.copy_efficiency, **measured}
    found["intra_node"] = {**base.intra_node, **{op: _link(by_op[op]) for op in COLLECTIVES if op in by_op}}
    return replace(base, **found)


def _linear_work(p: Point) -> tuple[float, float, float]:
    gemm = Gemm(p["m"], p["n"], p["k"])
    return 1.0, gemm.flops(p["pass"]), gemm.bytes(p["pass"])


def _attention_work(p: Point) -> tuple[float, float, float]:
    return 1.0, attention_flops(p["sequence"], p["batch"], p["heads"] * p["head_dim"], p["pass"]), 0.0


def _fit(
    points: Sequence[Point], work: Callable[[Point], tuple[float, ...]], peak_flops: float
) -> dict[str, dict[str, Rate]]:
    """Fit the rate of each format and direction, which is at most the device's peak in that format, in bf16 `peak_flops`."""
    fitted: dict[str, dict[str, Rate]] = {}
    for form, direction in dict.fromkeys((p["format"], p["pass"]) for p in points):
        mine = [p for p in points if (p["format"], p["pass"]) == (form, direction) and p["seconds"] > 0]
        columns = list(zip(*(work(p) for p in mine)))
        least = (0.0, 1 / (peak_flops if form == "bf16" else FP8_SPEEDUP * peak_flops), 0.0)
        fitted.setdefault(form, {})[direction] = Rate(*fit_nonnegative(columns, [p["seconds"] for p in mine], least))
    return fitted


def memory_bytes_per_token(model: ModelConfig, operation: str, tp: int, direction: Direction) -> float:
    """Return the bytes per token that a memory-bound operation of the model's mixers moves on a rank, in bf16."""
    found = {work.operation: work.bytes for work in _memory_work(model, tp, direction)}
    return found[operation]


def _memory_work(model: ModelConfig, tp: int, direction: Direction) -> Iterator[MemoryWork]:
    """Yield the memory-bound operations of the model's mixers for one token."""
    plan = Plan(model, ParallelConfig(tensor_parallel_size=tp), tp, 1, 1, 1)
    for shard in plan.shards.values():
        work = mixer_spec(shard.block.mixer).work(shard, direction)
        yield from (one for one in work if isinstance(one, MemoryWork))


def _efficiency(points: Sequence[Point], model: ModelConfig, copy: float) -> float:
    """Return the share of the copy rate: bytes of all points over the time of all."""
    size: float = sum(p["tokens"] * memory_bytes_per_token(model, p["op"], p["degree"], p["pass"]) for p in points)
    seconds: float = sum(p["seconds"] for p in points)
    return size / seconds / copy


def _recurrence_table(points: Sequence[Point]) -> dict[str, dict[float, float]]:
    """Return the table of recurrence times. Of several sequence lengths with the same rows it has the mean per token."""
    table: dict[str, dict[float, list[float]]] = {"forward": {}, "backward": {}}
    for p in points:
        state = p["key_head_dim"] * p["value_head_dim"] / RECURRENCE_STATE
        seconds = p["seconds"] * RECURRENCE_TOKENS / p["sequence"] / state
        table[p["pass"]].setdefault(float(p["heads"] * p["batch"]), []).append(seconds)
    return {way: {rows: sum(s) / len(s) for rows, s in sorted(found.items())} for way, found in table.items()}


def _link(points: Sequence[Point]) -> Link:
    """Return latency per hop and bandwidth. A ring of n ranks has n - 1 hops, an all-reduce twice as many."""
    columns = [
        [hops(p["op"], p["ranks"]) for p in points],
        [wire_bytes(p["op"], p["ranks"], p["bytes"]) for p in points],
    ]
    latency, per_byte = fit_nonnegative(columns, [p["seconds"] for p in points])
    return Link(latency, 1 / per_byte if per_byte else float("inf"))
