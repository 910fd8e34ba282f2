"""Safe YAML without duplicate keys, and with the numbers of YAML 1.2.

PyYAML reads YAML 1.1, in which `1e-5` is text, `1:30` is ninety, `0123` is 83, `no` is false and `2024-01-01` is a date.
Here `1e-5` is a float, and the others are text.

ruamel.yaml reads YAML 1.2 but would not replace this file: it reports one duplicate key without its path, and it needs another
resolver, too, because `2024-01-01` is a date and `0123` a number in it. It takes 0.1 s to import (PyYAML: 0.015 s), and 1.5 times
(reading) to 2.5 times (writing) as long. transformers requires PyYAML anyway.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from megatron_hybrid.base.errors import ConfigError, Problems, join

_PLAIN: tuple[tuple[str, str, str], ...] = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
)
"""Kind, pattern and first characters of plain values."""


MAX_CHARACTERS = 512 << 10
MAX_NODES = 20_000
"""Most keys and values, with every use of an alias counted as what it stands for."""
MAX_DEPTH = 50
_LONGEST_INTEGER = 30
"""Digits."""


class TooLarge(Exception):
    """A text that is, or expands to, more than any configuration holds."""


class _Loader(yaml.SafeLoader):
    """Safe loader: it creates only dicts, lists, text, numbers, booleans and null, and stops at MAX_NODES and MAX_DEPTH."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one node, as PyYAML does, within the limits."""
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_NODES:
            raise TooLarge(f"it has more than {MAX_NODES:,} keys and values")
        if self._depth > MAX_DEPTH:
            raise RecursionError
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Construct an integer with a bounded number of digits: a longer one fits no field, and is slow to print."""
        if len(node.value) > _LONGEST_INTEGER:
            raise ValueError(f"an integer of {len(node.value):,} digits")
        value: int = super().construct_yaml_int(node)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    """Dumper without aliases, with lists of plain values on one line. _Loader reads its output back equal."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _kind, _looks, _begins in _PLAIN:
        for _first in [*_begins, *([""] if _kind == "null" else [])]:
            _pattern = re.compile(rf"(?:{_looks})\Z")
            _class.yaml_implicit_resolvers.setdefault(_first, []).append((f"tag:yaml.org,2002:{_kind}", _pattern))


def _one_line(dumper: _Dumper, data: list[object]) -> yaml.Node:
    plain = not any(isinstance(item, dict | list) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=plain)


_Dumper.add_representer(list, _one_line)


def read(text: str, name: str, field: str = "") -> object:
    """Return the value of a YAML text.

    Args:
        name: origin of the text, for errors. field: configuration field that the value is for.

    Raises:
        ConfigError: not YAML, a duplicate key, a tag, or a text that is too large, too deeply nested or expands too much.
    """
    _check_size(len(text), name)
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded_size(node, {}) > MAX_NODES:
            raise TooLarge(f"its aliases contain themselves, or stand for more than {MAX_NODES:,} keys and values")
        Problems((join(field, path), f"{what} of {name}; keep one") for path, what in _duplicates(node)).raise_if_any()
        value: object = loader.construct_document(node)
        return value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError.at(
            name,
            f"is not YAML: {where}{error.problem or error.context}; {_remedy(error)}",
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError.at(
            name,
            f"is not YAML: {error}; save it as plain text",
        ) from None
    except TooLarge as error:
        raise ConfigError.at(
            name,
            f"is refused: {error}; write out the fields of a run, which are far fewer",
        ) from None
    except RecursionError:
        raise ConfigError.at(
            name,
            "is nested too deeply; a run has three levels at most",
        ) from None
    except ConfigError:
        raise
    except ValueError as error:  # a number with thousands of digits
        raise ConfigError.at(
            name,
            f"holds a value that cannot be read: {error}; correct it, or put it in quotes",
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def read_file(path: Path, name: str) -> object:
    """Return the value of a YAML file.

    Args:
        name: origin of the text, for errors.

    Raises:
        ConfigError: as `read`.
        OSError, UnicodeDecodeError: the file cannot be read, or is not UTF-8.
    """
    _check_size(path.stat().st_size, name)
    with path.open("rb") as file:  # a pipe or device has no size
        data = file.read(4 * MAX_CHARACTERS + 1)
    _check_size(len(data), name)
    return read(data.decode("utf-8"), name)


def _check_size(size: int, name: str) -> None:
    if size > MAX_CHARACTERS:
        raise ConfigError.at(
            name,
            f"has {size:,} characters, and at most {MAX_CHARACTERS:,} are read; give a configuration file",
        )


def _expanded_size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of nodes below a node, where every alias counts as what it stands for. `known`: results by identity."""
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # of a node that contains itself
        children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = () if isinstance(node, yaml.ScalarNode) else children
        known[id(node)] = 1 + sum(_expanded_size(child, known) for child in inner)
    return known[id(node)]


def write(value: object) -> str:
    """Return YAML that `read` reads back equal, with keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _remedy(error: yaml.MarkedYAMLError) -> str:
    problem = f"{error.problem} {error.context}"
    if "alias" in problem:
        return "put text that begins with * or & in quotes"
    if "tab" in problem or r"'\t'" in problem:
        return "indent with spaces, not tabs"
    if "constructor for the tag" in problem:
        return "write plain values, without !tags"
    if "mapping values are not allowed" in problem:
        return "check the indentation, and put text that holds ': ' in quotes"
    return "check indentation, brackets and quotes"


def _duplicates(root: yaml.Node) -> list[tuple[str, str]]:
    """Return the duplicate keys of mappings, of which PyYAML would silently take the last."""
    found: list[tuple[str, str]] = []
    seen: set[int] = set()
    waiting: list[tuple[tuple[int | str, ...], yaml.Node]] = [((), root)]
    while waiting:
        path, node = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [((*path, index), item) for index, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            lines: dict[Hashable, int] = {}
            for key, item in node.value:
                here, line = str(key.value), key.start_mark.line + 1
                if here in lines and key.tag != "tag:yaml.org,2002:merge":
                    found.append((join(*path, here), f"is given twice, on lines {lines[here]} and {line}"))
                lines.setdefault(here, line)
                waiting.append(((*path, here), item))
    return found
