"""Text and JSON of a search: the ranked table, one plan by part, and reasons for rejections."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_hybrid.base.errors import shown
from megatron_hybrid.planner import network
from megatron_hybrid.planner.job import Job
from megatron_hybrid.planner.layouts import degrees_of
from megatron_hybrid.planner.query import matches, parse_condition
from megatron_hybrid.planner.search import Candidate, Rejection, SearchResult

GB = 1e9
HEADER = ("", "TP", "CP", "PP", "VPP", "DP", "mbs", "recompute", "GB", "s/step", "tokens/s/GPU", "MFU", "largest parts")
LEFT_ALIGNED = ("recompute", "largest parts")


def format_table(found: SearchResult, top: int) -> str:
    """Return the table of the best `top` candidates."""
    lines = [heading(found.job), ""]
    if not found.candidates:
        return "\n".join([*lines, "no layout fits.", *summarize_rejections(found.rejections)])
    rows = [HEADER, *(_row(place, candidate) for place, candidate in enumerate(found.candidates[:top], 1))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    for row in rows:
        cells = [
            cell.ljust(width) if name in LEFT_ALIGNED else cell.rjust(width)
            for name, cell, width in zip(HEADER, row, widths)
        ]
        lines.append("  ".join(cells).rstrip())
    count, rejected = len(found.candidates), len(found.rejections)
    lines += ["", f"{count} layouts fit; {rejected} are rejected (--why tp=4 gives the reasons)"]
    return "\n".join(lines)


def _row(place: int, candidate: Candidate) -> tuple[str, ...]:
    plan, step = candidate.plan, candidate.step
    sizes = (plan.tp, plan.cp, plan.pp, plan.vpp, plan.dp, plan.micro_batch_size)
    return (
        f"{place}.",
        *map(str, sizes),
        plan.parallel.recompute_granularity,
        f"{candidate.need / GB:.1f}",
        f"{step.seconds:.3f}",
        f"{step.tokens_per_gpu:,.0f}",
        f"{step.mfu:.1%}",
        _largest_parts(step.parts),
    )


def heading(job: Job) -> str:
    """Return a line with the job."""
    precision = f"fp8_{job.precision.fp8_recipe}" if job.precision.fp8_recipe else job.dtype
    tokens = job.global_batch_size * job.sequence_length
    documents = f", documents with an attended length of {job.attended_length:,}" if job.attended_length else ""
    return (
        f"{job.model.num_layers} layers on {job.gpus} x {job.hardware.name}, {precision}: {job.global_batch_size} sequences of "
        f"{job.sequence_length} tokens per step ({tokens:,} tokens{documents})"
    )


def _largest_parts(parts: Mapping[str, float]) -> str:
    total = sum(parts.values())
    most = sorted(parts.items(), key=lambda part: -part[1])[:4]
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in most)


def format_candidate(candidate: Candidate, job: Job) -> str:
    """Return memory and time of one candidate by part, with the assumptions behind them."""
    memory, step = candidate.memory, candidate.step

    def size_line(name: str, size: float, of: str = "GB") -> str:
        return f"    {name:<42} {size / GB:8.2f} {of}"

    lines = [candidate.plan.label]
    if split := candidate.plan.parallel.pipeline_split:
        lines.append(f"  pipeline_split {list(split)}: layers of each virtual stage")
    if candidate.plan.parallel.keep_delta_rule_states:
        lines.append("  keep_delta_rule_states true: Gated DeltaNet's states are not computed again")
    lines.append(f"  memory of the fullest GPU (pipeline rank {memory.pipeline_rank})")
    lines += [size_line(name, size) for name, size in memory.parts().items()]
    lines.append(size_line("peak of all tensors", memory.total))
    if memory.padding:
        lines.append(size_line("share of dummy heads and padding", memory.padding))
    available = f"of {job.hardware.memory_bytes / GB:.1f} GB"
    lines.append(size_line("with reserve and fragmentation", candidate.need, available))
    lines.append("  step")
    lines += [f"    {name:<42} {seconds:8.3f} s  {seconds / step.seconds:6.1%}" for name, seconds in step.parts.items()]
    total = f"{step.seconds:8.3f} s, {step.tokens_per_gpu:,.0f} tokens/s/GPU, MFU {step.mfu:.1%}"
    lines.append(f"    {'total':<42} {total}")
    lines += [f"    {name:<42} {seconds:8.3f} s" for name, seconds in step.hidden.items()]
    return "\n".join([*lines, "  assumed", *(f"    {line}" for line in network.assumptions(job.hardware))])


def explain(found: SearchResult, condition: str) -> str:
    """Return the outcome of the layouts that a condition such as `tp=4` or `tp=4,recompute=none` selects.

    Raises:
        ConfigError: the condition cannot be read.
    """
    wanted = parse_condition(condition)
    lines = [f"{condition}:"]
    fits = [(place, c) for place, c in enumerate(found.candidates, 1) if matches(degrees_of(c.plan), wanted)]
    if fits:
        place, best = fits[0]
        lines.append(f"  {len(fits)} layouts fit; the best is number {place}: {best.plan.label}")
        if place > 1:
            lines.append(_difference(best, found.candidates[0]))
    refused = [rejection for rejection in found.rejections if matches(rejection.degrees, wanted)]
    if not fits and not refused:
        return f"{condition}: no such layout of {found.job.gpus} GPUs"
    return "\n".join(lines + summarize_rejections(refused))


def _difference(one: Candidate, best: Candidate) -> str:
    """Return by how much, and in which parts, a candidate is slower than the best."""
    slower = one.step.seconds - best.step.seconds
    names = {**best.step.parts, **one.step.parts}
    more = {name: one.step.parts.get(name, 0.0) - best.step.parts.get(name, 0.0) for name in names}
    most = ", ".join(f"{name} {s:+.3f} s" for name, s in sorted(more.items(), key=lambda part: -abs(part[1]))[:4])
    return f"  {slower:.3f} s ({slower / best.step.seconds:.1%}) slower than {best.plan.label}: {most}"


def summarize_rejections(rejections: Iterable[Rejection], most: int = 12) -> list[str]:
    """Return a line per reason, with the number of layouts and an example. For memory it is the layout nearest to fitting."""
    grouped: dict[str, list[Rejection]] = {}
    for rejection in rejections:
        grouped.setdefault(_kind(rejection.reason), []).append(rejection)
    lines = []
    for kind, group in sorted(grouped.items(), key=lambda item: -len(item[1]))[:most]:
        one = min(group, key=lambda r: float(r.reason.split()[1])) if kind == "memory" else group[0]
        degrees = " ".join(f"{name}={shown(value)}" for name, value in one.degrees.items())
        lines.append(f"  {len(group)} rejected: {one.reason}  [{'e.g. ' if len(group) > 1 else ''}{degrees}]")
    return lines


def _kind(reason: str) -> str:
    """Return a key that reasons which differ only in their numbers share."""
    return "memory" if reason.startswith("needs ") else "".join(c for c in reason if not c.isdigit())


def as_json(found: SearchResult, top: int) -> dict[str, Any]:
    """Return the best `top` candidates with every part, and the number of rejections by reason."""
    reasons = Counter(_kind(rejection.reason) for rejection in found.rejections)
    return {
        "gpus": found.job.gpus,
        "gpu": found.job.hardware.name,
        "measured": found.job.hardware.measured,
        "sequence_length": found.job.sequence_length,
        "global_batch_size": found.job.global_batch_size,
        "attended_length": found.job.attended_length,
        "assumptions": network.assumptions(found.job.hardware),
        "candidates": [candidate_json(candidate) for candidate in found.candidates[:top]],
        "rejected": dict(reasons.most_common()),
    }


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """Return degrees, bytes and seconds by part."""
    step, memory = candidate.step, candidate.memory
    return {
        **degrees_of(candidate.plan),
        "pipeline_split": candidate.plan.parallel.pipeline_split,
        "keep_delta_rule_states": candidate.plan.parallel.keep_delta_rule_states,
        "seconds": step.seconds,
        "tokens_per_s_per_gpu": step.tokens_per_gpu,
        "mfu": step.mfu,
        "time": dict(step.parts),
        "hidden": dict(step.hidden),
        "memory_bytes": memory.total,
        "device_bytes": candidate.need,
        "memory": memory.parts(),
        "padding_bytes": memory.padding,
    }
