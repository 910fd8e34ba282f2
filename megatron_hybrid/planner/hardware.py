"""Measured rates of a GPU and its network, as gpus/*.yaml hold them (megatron-hybrid calibrate writes such files)."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megatron_hybrid.base import nearest, yaml_text
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.command_line import read_yaml

FOLDER = Path(__file__).parent / "gpus"
RECURRENCE_TOKENS = 8192
"""Tokens per sequence in the table of recurrence times."""
RECURRENCE_STATE = 96 * 192
"""Entries of a head's state in the table of recurrence times."""
RENAMED = {
    "delta_rule": "recurrence",
    "copy": "copy_bytes_per_second",
    "efficiency": "copy_efficiency",
    "node": "intra_node",
    "across": "inter_node",
    "host_layer": "host_seconds_per_layer",
    "host_collective": "host_seconds_per_collective",
    "host_step": "host_seconds_per_step",
    "reserve": "reserved_bytes",
    "memory": "memory_bytes",
    "fp8_tensorwise": "tensorwise",
    "fp8_delayed": "delayed",
    "fp8_blockwise": "blockwise",
}
"""Earlier names of keys in hardware files, which still load."""


@dataclass(frozen=True)
class Rate:
    """Time of an operation: latency + FLOPs / rate + bytes / bandwidth. A term that is missing is zero."""

    latency: float
    per_flop: float
    per_byte: float = 0.0

    def seconds(self, flops: float, size: float = 0.0) -> float:
        return self.latency + flops * self.per_flop + size * self.per_byte


@dataclass(frozen=True)
class Link:
    """Time of a collective: latency per hop, and bytes through the slowest link."""

    latency: float
    bytes_per_second: float


@dataclass(frozen=True)
class Hardware:
    """Rates of one kind of GPU, in seconds, bytes and FLOPs. Tables have the keys of the YAML file."""

    name: str
    memory_bytes: float
    """Device memory that PyTorch sees."""
    peak_flops: float
    """Dense bf16 FLOP/s, of which MFU is a share."""
    gpus_per_node: int
    measured: str
    """Date and place of the measurements, and what was not measured."""
    linear: Mapping[str, Mapping[str, Rate]]
    """GEMMs of a linear, by format and direction."""
    attention: Mapping[str, Mapping[str, Rate]]
    """Softmax attention, by format and direction."""
    recurrence: Mapping[str, Mapping[float, float]]
    """Seconds of a linear recurrence, by direction and heads x sequences, for RECURRENCE_TOKENS and RECURRENCE_STATE."""
    copy_bytes_per_second: float
    """Bytes read and written by a copy."""
    copy_efficiency: Mapping[str, float]
    """Share of the copy rate that memory-bound operations reach, by name; `other` for all that are not listed."""
    intra_node: Mapping[str, Link]
    """Collectives over NVLink."""
    inter_node: Mapping[str, Link]
    """Collectives over the network, for one GPU's share of it."""
    host_seconds_per_layer: float
    """Time in which Python launches one layer's forward or backward pass."""
    host_seconds_per_collective: float
    """Additional time of a launch-bound layer per collective among its tensor parallel ranks: Python, and ranks that wait for the
    last one to launch."""
    host_seconds_per_step: float
    """Time per step outside of the layers."""
    reserved_bytes: float
    """Device memory that CUDA, NCCL and other libraries take outside of PyTorch's tensors."""
    fragmentation: float
    """Share of the tensors' peak that the allocator may not be able to use."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Calibration factors by part of the step time; 1 for parts that are not listed."""

    def factor(self, part: str) -> float:
        return self.factors.get(part, 1.0)

    def calibrated(self, factors: Mapping[str, float]) -> "Hardware":
        """Return the hardware with these calibration factors instead of its own."""
        return replace(self, factors=dict(factors))

    def copy_seconds(self, operation: str, size: float) -> float:
        """Return the time of a memory-bound operation that reads and writes `size` bytes."""
        efficiency = self.copy_efficiency.get(operation, self.copy_efficiency["other"])
        return size / (self.copy_bytes_per_second * efficiency)

    def recurrence_seconds(self, direction: str, tokens: float, rows: float, state: int) -> float:
        """Return the time of a linear recurrence over `rows` heads x sequences of `tokens` tokens.

        The time is linear in the rows between measured points. FLOPs do not predict it: few rows leave a serial chain of chunks,
        many fill the device.

        Args:
            state: entries of a head's state.
        """
        table = sorted(self.recurrence[direction].items())
        return interpolate(table, rows) * tokens / RECURRENCE_TOKENS * state / RECURRENCE_STATE


def interpolate(table: Sequence[tuple[float, float]], x: float) -> float:
    """Interpolate piecewise linearly. The outer pieces are extrapolated, down to half of the smallest value."""
    if len(table) == 1:
        return table[0][1]
    at = min(max(bisect_left(table, (x,)), 1), len(table) - 1)
    (x0, y0), (x1, y1) = table[at - 1], table[at]
    return max(y0 + (y1 - y0) * (x - x0) / (x1 - x0), min(y for _, y in table) * 0.5)


def load(name_or_path: str) -> Hardware:
    """Load a hardware file by name (`h100-80gb`, in planner/gpus/) or by path.

    Raises:
        ConfigError: there is no such file, or it lacks something.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
        raise ConfigError.at(
            "gpu",
            f"{name_or_path} has no hardware file; the nearest of {', '.join(known)} is {nearest.word(name_or_path, known)}, or "
            "measure one with megatron-hybrid calibrate",
        )
    data = read_yaml("gpu", path)
    try:
        return _hardware(_renamed(data))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError.at(
            str(path), f"is not a hardware file ({error!r}); compare it with {FOLDER / 'h100-80gb.yaml'}"
        ) from None


def _renamed(data: Any) -> Any:
    """Return a file's data with today's keys, on all levels."""
    return {RENAMED.get(key, key): _renamed(value) for key, value in data.items()} if isinstance(data, dict) else data


def _hardware(data: Mapping[str, Any]) -> Hardware:
    found: dict[str, Any] = {}
    for item in fields(Hardware):
        if item.name == "factors":
            continue
        value = data[item.name]
        if item.name in ("linear", "attention"):
            value = {form: {way: _rate_in(**rate) for way, rate in ways.items()} for form, ways in value.items()}
        elif item.name in ("intra_node", "inter_node"):
            value = {operation: _link_in(**link) for operation, link in value.items()}
        elif item.name == "recurrence":
            value = {way: {float(rows): float(s) for rows, s in row.items()} for way, row in value.items()}
        found[item.name] = item.type(value) if item.type in (float, int) else value
    return Hardware(**found)


def dump(hardware: Hardware, comment: str = "") -> str:
    """Return the hardware as YAML, which `load` reads back (to five digits)."""
    data: dict[str, Any] = {}
    for item in fields(hardware):
        value = getattr(hardware, item.name)
        if item.name in ("linear", "attention"):
            value = {form: {way: _rate_out(rate) for way, rate in ways.items()} for form, ways in value.items()}
        elif item.name in ("intra_node", "inter_node"):
            value = {operation: _link_out(link) for operation, link in value.items()}
        if item.name != "factors":
            data[item.name] = _short(value)
    return comment + yaml_text.write(data)


# Files have microseconds, TFLOP/s and GB/s, and null where a term is missing.


def _rate_out(rate: Rate) -> dict[str, float | None]:
    inverse = (None if not x else unit / x for x, unit in ((rate.per_flop, 1e-12), (rate.per_byte, 1e-9)))
    return dict(zip(("latency_us", "tflops", "gb_s"), (rate.latency * 1e6, *inverse)))


def _rate_in(latency_us: float, tflops: float | None, gb_s: float | None) -> Rate:
    return Rate(latency_us * 1e-6, 1e-12 / tflops if tflops else 0.0, 1e-9 / gb_s if gb_s else 0.0)


def _link_out(link: Link) -> dict[str, float]:
    return {"latency_us": link.latency * 1e6, "gb_s": link.bytes_per_second / 1e9}


def _link_in(latency_us: float, gb_s: float) -> Link:
    return Link(latency_us * 1e-6, gb_s * 1e9)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return {key: _short(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
