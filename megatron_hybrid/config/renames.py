"""Old names of configuration fields, accepted with a warning.

- `rename_fields`: apply the table to the sections of a run (a YAML file, or the configuration saved in a checkpoint).
- `rename_override`: apply it to one `section.key=value` of the command line.
- `StartingPoint`: the old pair `checkpoint.load` and `checkpoint.weights_only`, which one field alone does not translate.
"""

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from megatron_hybrid.base.errors import ConfigError, shown

Assignment = tuple[list[str], object]
"""The path of a field, key by key, and its value."""


def _same(value: object) -> object:
    return value


def _recipe(value: object) -> object:
    return value.removeprefix("fp8_") if isinstance(value, str) else value


def _is_fp8(value: object) -> object:
    return {"fp8": True, None: False}.get(value, value) if isinstance(value, str | None) else value


@dataclass(frozen=True)
class Rename:
    """An old field, the field that replaces it, and the conversion of its value."""

    old: str
    new: str
    convert: Callable[[object], object] = _same


RENAMES = (
    Rename("precision.linear", "precision.fp8_recipe", _recipe),
    Rename("precision.attention", "precision.fp8_attention", _is_fp8),
    Rename("precision.fp8_parameters", "precision.fp8_param_gather"),
    Rename("precision.amax_history", "precision.fp8_amax_history_len"),
    Rename("precision.bf16_layers_at_start", "precision.num_layers_at_start_in_bf16"),
    Rename("precision.bf16_layers_at_end", "precision.num_layers_at_end_in_bf16"),
    Rename("precision.cache_weights", "precision.cache_fp8_weights"),
    Rename("precision.parts", "model.backend"),
    Rename("parallel.recompute", "parallel.recompute_granularity"),
    Rename("model.preset", "model.base_preset"),
    Rename("train.optimizer.name", "train.optimizer.kind"),
)
NEW_VALUES: Mapping[str, Callable[[object], object]] = {"precision.fp8_recipe": _recipe}
"""Fields that keep their name and whose old values are converted."""
LOAD, WEIGHTS_ONLY = "checkpoint.load", "checkpoint.weights_only"
RESUME, INIT_FROM = "checkpoint.resume", "checkpoint.init_from"

_warned: set[str] = set()


def _warn(old: str, new: str) -> None:
    """Print one line per old name and process, on the first rank of a run."""
    if old not in _warned and os.environ.get("RANK", "0") == "0":
        _warned.add(old)
        print(f"warning: {old} is deprecated; write {new}", file=sys.stderr, flush=True)


def rename_fields(data: Mapping[str, Any], quiet: bool = False) -> tuple[dict[str, Any], list[Assignment]]:
    """Return a run's sections under the current names, and the fields that move to `model`.

    A moved field is returned as an assignment, because `model` may still be the name of a preset.

    Args:
        data: sections of a run; what is not a section is left as it is.
        quiet: do not warn, because the names are in a file that no user edits.

    Raises:
        ConfigError: a field is given under its old and its new name.
    """
    run, moved = deepcopy(dict(data)), list[Assignment]()
    for rename in RENAMES:
        (section, old), (target, new) = rename.old.rsplit(".", 1), rename.new.rsplit(".", 1)
        fields = _section(run, section)
        if old not in fields:
            continue
        if new in _section(run, target):
            raise _given_twice(rename.old, rename.new)
        if not quiet:
            _warn(rename.old, rename.new)
        value = rename.convert(fields[old])
        if target == section:
            renamed = {new if key == old else key: value if key == old else kept for key, kept in fields.items()}
            fields.clear()
            fields |= renamed
        else:
            del fields[old]
            moved.append(([target, new], value))
    for path, convert in NEW_VALUES.items():
        section, name = path.split(".")
        if name in (fields := _section(run, section)):
            fields[name] = _converted(path, fields[name], convert, quiet)
    if isinstance(checkpoint := run.get("checkpoint"), dict):
        run["checkpoint"] = _rename_checkpoint(checkpoint, quiet)
    return run, moved


def _section(run: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the fields of a section such as `train.optimizer`; empty if it is not there, or not a section."""
    found: Any = run
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def rename_saved(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration that a checkpoint or another tool saved under the current names, without warnings."""
    run, moved = rename_fields(data, quiet=True)
    for (section, name), value in moved:
        if isinstance(fields := run.get(section), dict):
            fields[name] = value
    return run


def rename_override(keys: list[str], value: object) -> list[Assignment]:
    """Return the assignments that an override stands for under the current names.

    `checkpoint.load` and `checkpoint.weights_only` are left as they are: see `StartingPoint`.

    Raises:
        ConfigError: a section is given as a whole, with a field under its old and its new name.
    """
    path = ".".join(keys)
    if isinstance(value, dict):
        nested: dict[str, Any] = value
        for key in reversed(keys):
            nested = {key: nested}
        run, moved = rename_fields(nested)
        return [(keys, _section(run, path)), *moved]
    for rename in RENAMES:
        if path == rename.old:
            _warn(rename.old, rename.new)
            return [(rename.new.split("."), rename.convert(value))]
    if path in NEW_VALUES:
        return [(keys, _converted(path, value, NEW_VALUES[path], quiet=False))]
    return [(keys, value)]


class StartingPoint:
    """Overrides of `checkpoint.load` and `checkpoint.weights_only`, applied over what the file says of the start."""

    def __init__(self, overrides: Iterable[Assignment]) -> None:
        self.old: dict[str, object] = {}
        self.others: list[Assignment] = []
        new = set()
        for keys, value in overrides:
            path = ".".join(keys)
            if path in (LOAD, WEIGHTS_ONLY):
                self.old[keys[1]] = value
            else:
                self.others.append((keys, value))
                new |= {path} & {RESUME, INIT_FROM}
        if self.old and new:
            raise _given_twice(f"checkpoint.{next(iter(self.old))}", new.pop())

    def assignments(self, checkpoint: object) -> list[Assignment]:
        """Return the old overrides as assignments of the new fields.

        Args:
            checkpoint: the section, with current names, of the file that they override.
        """
        if not self.old:
            return []
        fields = checkpoint if isinstance(checkpoint, dict) else {}
        before: dict[str, object] = {"load": fields.get("resume", "auto"), "weights_only": False}
        if (folder := fields.get("init_from")) is not None:
            before = {"load": folder, "weights_only": True}
        for name in self.old:
            _warn(f"checkpoint.{name}", f"{RESUME} or {INIT_FROM}")
        return [(["checkpoint", name], value) for name, value in _start({**before, **self.old}).items()]


def _rename_checkpoint(fields: dict[str, Any], quiet: bool) -> dict[str, Any]:
    old: dict[str, object] = {name: fields[name] for name in ("load", "weights_only") if name in fields}
    if not old:
        return fields
    for name in ("resume", "init_from"):
        if name in fields:
            raise _given_twice(f"checkpoint.{next(iter(old))}", f"checkpoint.{name}")
    if not quiet:
        for name in old:
            _warn(f"checkpoint.{name}", f"{RESUME} or {INIT_FROM}")
    return {**{name: value for name, value in fields.items() if name not in old}, **_start(old)}


def _start(old: Mapping[str, object]) -> dict[str, object]:
    """Return `resume` and `init_from` for an old pair.

    Raises:
        ConfigError: `weights_only` without a folder, or one that is not true or false.
    """
    load, weights_only = old.get("load", "auto"), old.get("weights_only", False)
    if not isinstance(weights_only, bool):
        raise ConfigError.at(WEIGHTS_ONLY, f"{shown(weights_only)} is not true or false; write {INIT_FROM}=FOLDER")
    if not weights_only:
        return {"resume": load, "init_from": None}
    if load in ("auto", "none"):
        raise ConfigError.at(
            WEIGHTS_ONLY,
            f"true needs a checkpoint to take weights from, and {LOAD} is {load}; write {INIT_FROM}=FOLDER",
        )
    return {"resume": "auto", "init_from": load}


def _converted(path: str, value: object, convert: Callable[[object], object], quiet: bool) -> object:
    new = convert(value)
    if new != value and not quiet:
        _warn(f"{path}={value}", f"{path}={new}")
    return new


def _given_twice(old: str, new: str) -> ConfigError:
    return ConfigError.at(old, f"is the old name of {new}, which is given too; remove {old}")
