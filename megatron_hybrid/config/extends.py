"""Configuration files that extend another: `extends: pretrain.yaml` takes that file's fields and replaces those that are given."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hybrid.base.errors import ConfigError, shown

Read = Callable[[str], dict[str, Any]]


def read_extended(path: str, read: Read, known: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the fields of a file over those of the files that it extends.

    Sections are merged field by field. A list, a plain value, null, and a model that names a preset replace what they extend.

    Args:
        read: returns the fields of one file.
        known: files that extend this one.

    Raises:
        ConfigError: as `read`; or a file extends itself, or what it extends is not a path.
    """
    data = read(path)
    if "extends" not in data:
        return data
    base = data.pop("extends")
    if not isinstance(base, str) or not base:
        raise ConfigError.at(
            "extends", f"{shown(base)} in {path} is not a file; give its path, relative to {path}, or remove it"
        )
    here, there = Path(path).resolve(), Path(path).parent / base
    if not there.is_file():
        raise ConfigError.at("extends", f"{base} in {path}: there is no file {there}; correct the path")
    if there.resolve() in (here, *known):
        raise ConfigError.at("extends", f"{base} in {path} extends {path} itself; remove one of the two")
    return _merge(read_extended(str(there), read, (*known, here)), data)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    if isinstance(base.get("model"), str):  # the name of a preset
        base = base | {"model": {"base_preset": base["model"]}}
    merged = base | over
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict) and "base_preset" not in value:
            merged[name] = _merge(base[name], value)
    return merged
