"""Load a RunConfig from a YAML file and `section.key=value` overrides, and write it back."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_hybrid.base import nearest, yaml_text
from megatron_hybrid.base.errors import ConfigError, Problems, join, shown
from megatron_hybrid.config import presets
from megatron_hybrid.config.extends import read_extended
from megatron_hybrid.config.renames import StartingPoint, rename_fields, rename_override
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.translate import field_at, translate

_PRESET_KEYS = (["model"], ["model", "base_preset"], ["model", "of"], ["model", "from"])


def load_run(
    path_or_preset: str | None, overrides: Sequence[str] = (), architecture_of: presets.ArchitectureOf | None = None
) -> RunConfig:
    """Return the run of a YAML file with overrides applied.

    Args:
        path_or_preset: a YAML file, which may extend another (config/extends.py), the name of a model preset, or None if the
            overrides give every field.
        overrides: `section.key=value` with the value in YAML, `null` included. List entries are named by their index; the index
            one past the end appends: `data.train.0.weight=2`. A preset is applied before other overrides; otherwise, the later of
            two overrides of a field wins.
        architecture_of: reads `model.from`; None: such a model is refused.

    Raises:
        ConfigError: lists every wrong field with its remedy.
    """
    data, assignments = rename_fields(read_extended(path_or_preset, _read) if path_or_preset else {})
    given = [assignment for override in overrides for assignment in rename_override(*_parse(override))]
    start = StartingPoint(given)
    assignments += [*start.assignments(data.get("checkpoint")), *start.others]
    data["model"] = _as_preset(data.get("model"))
    for keys, value in assignments:
        if keys in _PRESET_KEYS:
            _assign(data, keys, _as_preset(value) if keys == ["model"] else value)
    data["model"] = presets.expand(data["model"], architecture_of)
    if data["model"] is None:
        del data["model"]
    problems = Problems()
    for keys, value in assignments:
        if keys not in _PRESET_KEYS:
            try:
                _assign(data, keys, value)
            except ConfigError as error:
                problems += error.problems
    problems.raise_if_any()
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise translate(error, RunConfig) from None


def dump_run(config: RunConfig) -> str:
    """Return the whole configuration as YAML, presets and defaults written out. `load_run` reads it back equal."""
    return yaml_text.write(config.model_dump(mode="json"))


def _read(path_or_preset: str) -> dict[str, Any]:
    path = Path(path_or_preset)
    if not path.exists():
        names = [*presets.SIZED, *presets.UNSIZED]
        if path_or_preset in names:
            return {"model": path_or_preset}
        hint = nearest.word(path_or_preset, names, cutoff=0.6)
        hint = f"did you mean {hint}?" if hint else f"give a YAML file, or one of {', '.join(names)}"
        raise ConfigError.at(
            path_or_preset,
            f"there is no such file, and no such preset; {hint}",
        )
    if path.is_dir():
        raise ConfigError.at(
            path_or_preset,
            f"is a folder; give a YAML file, such as {path / 'config.yaml'}",
        )
    try:
        data = yaml_text.read_file(path, path_or_preset)
    except OSError as error:
        raise ConfigError.at(
            path_or_preset,
            f"cannot be read: {error.strerror}; check its permissions",
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError.at(
            path_or_preset,
            f"is not UTF-8 text (byte {error.start}); save it as such",
        ) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        fields = ", ".join(RunConfig.model_fields)
        raise ConfigError.at(
            path_or_preset,
            f"holds {shown(data)}; write sections, `name: value`, of {fields}",
        )
    return data


def _parse(override: str) -> tuple[list[str], object]:
    """Parse an override: `data.train.0.weight=2` gives `(["data", "train", "0", "weight"], 2)`."""
    name, equals, text = override.partition("=")
    keys = name.strip().removeprefix("--").split(".")
    if not equals or not all(keys):
        raise ConfigError.at(
            override,
            "is not an override; write section.key=value, as in train.optimizer.lr=1e-4",
        )
    if not text.strip():
        raise ConfigError.at(
            name,
            f"has no value; write {name}=null for none, or {name}='\"\"' for empty text",
        )
    return keys, yaml_text.read(text, name, field=name)


def _as_preset(model: object) -> object:
    return {"base_preset": model} if isinstance(model, str) else model


def _assign(data: dict[str, Any], keys: list[str], value: object) -> None:
    """Set the value at `keys`, and create missing sections.

    Raises:
        ConfigError: the path leads through a plain value, or past the end of a list.
    """
    here: dict[str, Any] | list[Any] = data
    for depth, key in enumerate(keys):
        name = join(*keys[: depth + 1])
        last = depth + 1 == len(keys)
        if isinstance(here, dict):
            if last:
                here[key] = value
                return
            inner = here.get(key)
            if inner is None:
                inner = here[key] = _default(keys[: depth + 1]) if keys[depth + 1].isdecimal() else {}
        else:
            index = _index(here, key, join(*keys[:depth]))
            if index == len(here):
                here.append({})
            if last:
                here[index] = value
                return
            inner = here[index]
        if not isinstance(inner, dict | list):
            raise ConfigError.at(
                name,
                f"{shown(inner)} has no field {join(*keys[depth + 1 :])}; set {name} as a whole",
            )
        here = inner


def _index(entries: list[Any], key: str, name: str) -> int:
    if key.isdecimal() and len(key) < 10 and int(key) <= len(entries):
        return int(key)
    if key.isdecimal():
        raise ConfigError.at(
            join(name, key),
            f"{name} has {len(entries)} entries; the next is {join(name, len(entries))}",
        )
    first = join(name, 0)
    raise ConfigError.at(
        join(name, key),
        f"{name} is a list; say which entry by its index: {join(first, key)}",
    )


def _default(keys: list[str]) -> list[Any]:
    """Return the default of a list field, for an override of one of its entries."""
    field, _ = field_at(RunConfig, tuple(keys))
    default = () if field is None or field.is_required() else field.default
    return list(default) if isinstance(default, tuple) else []
