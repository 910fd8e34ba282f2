"""A GPU and its network, as measured: gpus/*.yaml, made by tools/calibrate.py, and the calibration laid over them."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megatron_hybrid.base import nearest, yaml_text
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.command_line import read_text

FOLDER = Path(__file__).parent / "gpus"
TOKENS = 8192
"""Of a sequence for which the delta rule's times are tabled."""


@dataclass(frozen=True)
class Rate:
    """Seconds of an operation: latency + work / speed + bytes / bandwidth, of which each may be missing."""

    latency: float
    per_flop: float
    per_byte: float = 0.0

    def seconds(self, flops: float, size: float = 0.0) -> float:
        return self.latency + flops * self.per_flop + size * self.per_byte


@dataclass(frozen=True)
class Link:
    """A collective's seconds: latency a hop, and bytes through the slowest wire."""

    latency: float
    bytes_a_second: float


@dataclass(frozen=True)
class Hardware:
    """Of one kind of GPU. Seconds, bytes and FLOPs; a table's keys are as the YAML file has them."""

    name: str
    memory: float
    """Bytes that torch sees."""
    peak_flops: float
    """Dense bf16, what MFU is a share of."""
    gpus_per_node: int
    measured: str
    """When, on what, and what of it was not measured."""
    linear: Mapping[str, Mapping[str, Rate]]
    """By format, forward and backward."""
    attention: Mapping[str, Mapping[str, Rate]]
    delta_rule: Mapping[str, Mapping[float, float]]
    """forward, backward -> heads x sequences -> seconds for 8192 tokens at a state of 96 x 192."""
    copy: float
    """Bytes a second, read and written."""
    efficiency: Mapping[str, float]
    """Share of `copy` that memory-bound operations reach: conv_gates, gated_norm, other."""
    node: Mapping[str, Link]
    """Collectives over NVLink."""
    across: Mapping[str, Link]
    """Collectives over the network between nodes, of one GPU's share of it."""
    host_layer: float
    """Seconds that Python needs to launch one layer's forward or backward pass."""
    host_collective: float
    """Seconds that a launch-bound layer takes more for each collective among its tensor parallel ranks: Python, and ranks that wait
    for whichever launches last."""
    host_step: float
    """Of a step, outside the layers."""
    reserve: float
    """Bytes that CUDA, NCCL and other libraries take outside of torch's tensors."""
    fragmentation: float
    """Share of the tensors' peak that the allocator may not be able to use."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Calibration by part of the step time; 1 where none is given."""

    def factor(self, part: str) -> float:
        return self.factors.get(part, 1.0)

    def calibrated(self, factors: Mapping[str, float]) -> "Hardware":
        """With these factors in place of its own."""
        return replace(self, factors=dict(factors))

    def delta_rule_seconds(self, which: str, sequence: int, rows: float, state: int) -> float:
        """Of the gated delta rule: `rows` heads x sequences of `sequence` tokens, a state of `state` entries a head.

        Between measured points linear in the rows; beyond them, as the last two lie. FLOPs do not predict it: few rows
        leave a serial chain of chunks, many fill the device.
        """
        table = sorted(self.delta_rule[which].items())
        return interpolate(table, rows) * sequence / TOKENS * state / (96 * 192)


def interpolate(table: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise linear; the outer pieces go on (to no less than the smallest value)."""
    if len(table) == 1:
        return table[0][1]
    at = min(max(bisect_left(table, (x,)), 1), len(table) - 1)
    (x0, y0), (x1, y1) = table[at - 1], table[at]
    return max(y0 + (y1 - y0) * (x - x0) / (x1 - x0), min(y for _, y in table) * 0.5)


def load(name_or_path: str) -> Hardware:
    """A hardware file by name (`h100-80gb`, in planner/gpus/) or by path.

    Raises:
        ConfigError: no such file, or one that lacks something.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
        hint = nearest.word(name_or_path, known)
        raise ConfigError.at("gpu", f"{name_or_path} has no hardware file; the nearest of {', '.join(known)} is {hint}, or "
                             "measure one with tools/calibrate.py")  # fmt: skip
    data = yaml_text.read(read_text("gpu", path), str(path))
    try:
        return _hardware(data)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError.at(
            str(path), f"is not a hardware file ({error!r}); compare it with {FOLDER / 'h100-80gb.yaml'}"
        ) from None


def _hardware(data: Mapping[str, Any]) -> Hardware:
    def rates(name: str) -> dict[str, dict[str, Rate]]:
        # files of earlier versions name the recipes fp8_tensorwise, ...
        return {
            form.removeprefix("fp8_"): {way: _rate_in(**rate) for way, rate in ways.items()}
            for form, ways in data[name].items()
        }

    tables = {way: {float(rows): float(s) for rows, s in row.items()} for way, row in data["delta_rule"].items()}
    links = {where: {op: _link_in(**link) for op, link in data[where].items()} for where in ("node", "across")}
    plain = ("name", "measured", "efficiency")
    numbers = ("memory", "peak_flops", "copy", "host_layer", "host_collective", "host_step", "reserve", "fragmentation")
    return Hardware(
        **{name: data[name] for name in plain},
        **{name: float(data[name]) for name in numbers},
        gpus_per_node=int(data["gpus_per_node"]),
        linear=rates("linear"),
        attention=rates("attention"),
        delta_rule=tables,
        **links,
    )


def dump(hardware: Hardware, comment: str = "") -> str:
    """As YAML, which `load` reads back (to five digits)."""
    data: dict[str, Any] = {}
    for item in fields(hardware):
        value = getattr(hardware, item.name)
        if item.name in ("linear", "attention"):
            value = {form: {way: _rate_out(rate) for way, rate in ways.items()} for form, ways in value.items()}
        elif item.name in ("node", "across"):
            value = {op: _link_out(link) for op, link in value.items()}
        if item.name != "factors":
            data[item.name] = _short(value)
    return comment + yaml_text.write(data)


# In a file: microseconds, TFLOP/s, GB/s; null where a term is missing.


def _rate_out(rate: Rate) -> dict[str, float | None]:
    inverse = (None if not x else unit / x for x, unit in ((rate.per_flop, 1e-12), (rate.per_byte, 1e-9)))
    return dict(zip(("latency_us", "tflops", "gb_s"), (rate.latency * 1e6, *inverse)))


def _rate_in(latency_us: float, tflops: float | None, gb_s: float | None) -> Rate:
    return Rate(latency_us * 1e-6, 1e-12 / tflops if tflops else 0.0, 1e-9 / gb_s if gb_s else 0.0)


def _link_out(link: Link) -> dict[str, float]:
    return {"latency_us": link.latency * 1e6, "gb_s": link.bytes_a_second / 1e9}


def _link_in(latency_us: float, gb_s: float) -> Link:
    return Link(latency_us * 1e-6, gb_s * 1e9)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return {key: _short(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
