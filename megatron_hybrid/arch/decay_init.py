"""Rules of the fields that say how the decay of a delta rule starts: a_init_range, dt_init_range and dt_init_floor."""

from typing import Any

from megatron_hybrid.base.errors import Problems
from megatron_hybrid.base.section import Section


def check_decay_init(section: Section, problems: Problems) -> None:
    """Add an error for each of the three fields of a mixer's section that is wrong."""
    fields: Any = section
    for name in ("a_init_range", "dt_init_range"):
        low, high = getattr(fields, name)
        if not 0 <= low < high:
            default = list(type(section).model_fields[name].default)
            problems.add(name, f"[{low}, {high}] must have 0 <= low < high; give two such numbers, as in {default}")
    floor, (low, high) = fields.dt_init_floor, fields.dt_init_range
    if floor > high:
        problems.add("dt_init_floor", f"{floor} is above all of dt_init_range = [{low}, {high}]; give at most {high}")
