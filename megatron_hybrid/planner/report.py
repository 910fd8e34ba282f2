"""An answer in words: the ranked table, the reasons, the breakdown of one plan, and all of it as JSON."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from megatron_hybrid.base.errors import ConfigError, shown
from megatron_hybrid.planner import network
from megatron_hybrid.planner.search import Answer, Candidate, Job, Rejection, degrees_of

GB = 1e9
_YES = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


def table(answer: Answer, top: int) -> str:
    """The best `top` candidates, one a line."""
    job = answer.job
    lines = [heading(job), ""]
    if not answer.candidates:
        return "\n".join([*lines, "no layout fits.", *summary(answer.rejections)])
    rows = [
        (
            "",
            "TP",
            "CP",
            "PP",
            "VPP",
            "DP",
            "mbs",
            "recompute",
            "GB",
            "s/step",
            "tokens/s/GPU",
            "MFU",
            "where the time goes",
        )
    ]
    for place, candidate in enumerate(answer.candidates[:top], 1):
        plan, step = candidate.plan, candidate.step
        sizes = (plan.tp, plan.cp, plan.pp, plan.vpp, plan.dp, plan.micro_batch_size)
        rows.append(
            (f"{place}.", *map(str, sizes), plan.parallel.recompute_granularity, f"{candidate.need / GB:.1f}", f"{step.seconds:.3f}",
             f"{step.tokens_per_gpu:,.0f}", f"{step.mfu:.1%}", _where(step.parts))
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if i in (7, 12) else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    lines += ["", f"{len(answer.candidates)} layouts fit; {len(answer.rejections)} do not (--why tp=4 tells why)"]
    return "\n".join(lines)


def heading(job: Job) -> str:
    """What was asked."""
    precision = f"fp8_{job.precision.fp8_recipe}" if job.precision.fp8_recipe else job.dtype
    tokens = job.global_batch_size * job.sequence_length
    return (
        f"{job.model.num_layers} layers on {job.gpus} x {job.hardware.name}, {precision}: {job.global_batch_size} sequences of "
        f"{job.sequence_length} a step ({tokens:,} tokens)"
    )


def _where(parts: dict[str, float]) -> str:
    total = sum(parts.values())
    most = sorted(parts.items(), key=lambda part: -part[1])[:4]
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in most)


def detail(candidate: Candidate, job: Job) -> str:
    """One plan by part: memory, time, and what they rest on."""
    memory, step, of = candidate.memory, candidate.step, candidate.need
    lines = [candidate.plan.label, f"  memory of the fullest GPU (pipeline rank {memory.pipeline_rank})"]
    lines += [f"    {name:<42} {size / GB:8.2f} GB" for name, size in memory.parts().items()]
    lines.append(f"    {'tensors at most':<42} {memory.total / GB:8.2f} GB")
    if memory.padding:
        lines.append(f"    {'of it for dummy heads and padding':<42} {memory.padding / GB:8.2f} GB")
    lines.append(f"    {'with reserve and fragmentation':<42} {of / GB:8.2f} of {job.hardware.memory / GB:.1f} GB")
    lines.append("  step")
    lines += [f"    {name:<42} {seconds:8.3f} s  {seconds / step.seconds:6.1%}" for name, seconds in step.parts.items()]
    lines.append(
        f"    {'in all':<42} {step.seconds:8.3f} s, {step.tokens_per_gpu:,.0f} tokens/s/GPU, MFU {step.mfu:.1%}"
    )
    lines += [f"    {name:<42} {seconds:8.3f} s" for name, seconds in step.hidden.items()]
    return "\n".join([*lines, "  assumed", *(f"    {line}" for line in network.assumptions(job.hardware))])


def why(answer: Answer, condition: str) -> str:
    """What became of the layouts that a condition such as `tp=4` or `tp=4,recompute=none` names.

    Raises:
        ConfigError: it names something else.
    """
    wanted = _condition(condition)
    lines = [f"{condition}:"]
    fits = [(place, c) for place, c in enumerate(answer.candidates, 1) if _matches(degrees_of(c.plan), wanted)]
    if fits:
        place, best = fits[0]
        first = answer.candidates[0]
        lines.append(f"  {len(fits)} layouts fit; the best is number {place}: {best.plan.label}")
        if place > 1:
            lines += _behind(best, first)
    refused = [r for r in answer.rejections if _matches(r.degrees, wanted)]
    return (
        "\n".join(lines + summary(refused))
        if fits or refused
        else f"{condition}: no such layout of {answer.job.gpus} GPUs"
    )


def _behind(one: Candidate, best: Candidate) -> list[str]:
    """By what a candidate is slower than the best."""
    slower = one.step.seconds - best.step.seconds
    names = {**best.step.parts, **one.step.parts}
    more = {name: one.step.parts.get(name, 0.0) - best.step.parts.get(name, 0.0) for name in names}
    most = ", ".join(f"{name} {s:+.3f} s" for name, s in sorted(more.items(), key=lambda part: -abs(part[1]))[:4])
    return [f"  {slower:.3f} s ({slower / best.step.seconds:.1%}) slower than {best.plan.label}: {most}"]


def summary(rejections: Iterable[Rejection], most: int = 12) -> list[str]:
    """Reasons, each with how many layouts it rules out and the first of them; of memory, the nearest to fitting."""
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
    """Reasons that differ only in their numbers count as one."""
    return "memory" if reason.startswith("needs ") else "".join(c for c in reason if not c.isdigit())


def _condition(text: str) -> dict[str, Any]:
    names: dict[str, Callable[[str], Any]] = dict.fromkeys(("tp", "pp", "vpp", "cp", "dp", "mbs"), int)
    names |= {"recompute": str, "sp": lambda value: _YES[value.lower()], "zero": lambda value: _YES[value.lower()]}
    wanted = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            wanted[name] = names[name](value)
        except (KeyError, ValueError):
            raise ConfigError.at(
                "why", f"{shown(part)} is not one of {', '.join(names)} with a value, as in tp=4"
            ) from None
    return wanted


def _matches(degrees: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """A rejection that says nothing of a degree is about all of its values."""
    return all(degrees.get(name, value) == value for name, value in wanted.items()) and any(
        n in degrees for n in wanted
    )


def as_json(answer: Answer, top: int) -> dict[str, Any]:
    """The best `top`, with every part, and the count of rejections by reason."""
    reasons = Counter(_kind(r.reason) for r in answer.rejections)
    return {
        "gpus": answer.job.gpus,
        "gpu": answer.job.hardware.name,
        "measured": answer.job.hardware.measured,
        "sequence_length": answer.job.sequence_length,
        "global_batch_size": answer.job.global_batch_size,
        "assumptions": network.assumptions(answer.job.hardware),
        "candidates": [candidate_json(c) for c in answer.candidates[:top]],
        "rejected": dict(reasons.most_common()),
    }


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """Degrees, bytes and seconds by part."""
    step, memory = candidate.step, candidate.memory
    return {
        **degrees_of(candidate.plan),
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
