"""From measured points (profiling/device_rates.py) to a hardware file's rates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.planner.fit import nonnegative
from megatron_hybrid.planner.hardware import TOKENS, Hardware, Link, Rate
from megatron_hybrid.planner.plan import Widths
from megatron_hybrid.planner.work import attention_flops, glue_bytes, hops, linear_bytes, linear_flops, wire_bytes

Point = Mapping[str, Any]
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "p2p")


def from_points(points: Sequence[Point], model: ModelConfig, base: Hardware, **changes: Any) -> Hardware:
    """The hardware that the points describe; what was not measured stays as in `base`.

    Args:
        model: at whose widths they were measured. changes: other fields, as they are.
    """
    by_op = {op: list(group) for op, group in groupby(sorted(points, key=lambda p: p["op"]), key=lambda p: p["op"])}
    found: dict[str, Any] = dict(changes)
    if copies := by_op.get("copy"):
        found["copy"] = max(p["bytes"] / p["seconds"] for p in copies)
    if linear := by_op.get("linear"):
        found["linear"] = {**base.linear, **_fit(linear, _linear_work)}
    if attention := by_op.get("attention"):
        found["attention"] = {**base.attention, **_fit(attention, _attention_work)}
    if delta_rule := by_op.get("delta_rule"):
        found["delta_rule"] = _delta_rule_table(delta_rule)
    copy = found.get("copy", base.copy)
    glue = {op: _efficiency(by_op[op], model, copy) for op in ("conv_gates", "gated_norm") if op in by_op}
    found["efficiency"] = {**base.efficiency, **glue}
    found["node"] = {**base.node, **{op: _link(by_op[op]) for op in COLLECTIVES if op in by_op}}
    return replace(base, **found)


def _linear_work(p: Point) -> tuple[float, float, float]:
    sizes = p["m"], p["n"], p["k"], p["pass"]
    return 1.0, linear_flops(*sizes), linear_bytes(*sizes)


def _attention_work(p: Point) -> tuple[float, float, float]:
    return 1.0, attention_flops(p["sequence"], p["batch"], p["heads"] * p["head_dim"], p["pass"]), 0.0


def _fit(points: Sequence[Point], work: Callable[[Point], tuple[float, ...]]) -> dict[str, dict[str, Rate]]:
    fitted: dict[str, dict[str, Rate]] = {}
    for form, way in dict.fromkeys((p["format"], p["pass"]) for p in points):
        mine = [p for p in points if (p["format"], p["pass"]) == (form, way) and p["seconds"] > 0]
        columns = list(zip(*(work(p) for p in mine)))
        fitted.setdefault(form.removeprefix("fp8_"), {})[way] = Rate(
            *nonnegative(columns, [p["seconds"] for p in mine])
        )
    return fitted


def _efficiency(points: Sequence[Point], model: ModelConfig, copy: float) -> float:
    """Of what a copy moves: bytes of all points over the time of all."""
    size = sum(p["tokens"] * glue_bytes(p["op"], Widths.padded(model, p["degree"]), p["pass"]) for p in points)
    return size / sum(p["seconds"] for p in points) / copy


def _delta_rule_table(points: Sequence[Point]) -> dict[str, dict[float, float]]:
    """Of several sequence lengths with the same rows, their mean a token."""
    table: dict[str, dict[float, list[float]]] = {"forward": {}, "backward": {}}
    for p in points:
        state = p["key_head_dim"] * p["value_head_dim"] / (96 * 192)
        seconds = p["seconds"] * TOKENS / p["sequence"] / state
        table[p["pass"]].setdefault(float(p["heads"] * p["batch"]), []).append(seconds)
    return {way: {rows: sum(s) / len(s) for rows, s in sorted(found.items())} for way, found in table.items()}


def _link(points: Sequence[Point]) -> Link:
    """Latency a hop and bandwidth, from times by size: of n ranks, a ring has n - 1 hops (an all-reduce twice as many)."""
    columns = [
        [hops(p["op"], p["ranks"]) for p in points],
        [wire_bytes(p["op"], p["ranks"], p["bytes"]) for p in points],
    ]
    latency, per_byte = nonnegative(columns, [p["seconds"] for p in points])
    return Link(latency, 1 / per_byte if per_byte else float("inf"))
