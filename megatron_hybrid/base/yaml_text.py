"""Safe YAML without duplicate keys, and with the numbers of YAML 1.2.

PyYAML reads YAML 1.1, in which `1e-5` is text, `1:30` is ninety, `0123` is 83, `no` is false and `2024-01-01` is a date.
Here `1e-5` is a float, and the others are text.

ruamel.yaml reads YAML 1.2 but would not replace this file: it reports one duplicate key without its path, and it needs another
resolver, too, because `2024-01-01` is a date and `0123` a number in it. It takes 0.1 s to import (PyYAML: 0.015 s), and 1.5 times
(reading) to 2.5 times (writing) as long. transformers requires PyYAML anyway.
"""

import re
from collections.abc import Hashable
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


class _Loader(yaml.SafeLoader):
    """Safe loader: it creates only dicts, lists, text, numbers, booleans and null."""


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
        ConfigError: not YAML, a duplicate key, or a tag.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
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
