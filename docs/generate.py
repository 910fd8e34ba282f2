"""Write the pages under docs/reference/ from the code: `python docs/generate.py`. tests/test_documentation.py checks them."""

import inspect
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from pydantic.fields import FieldInfo  # noqa: E402

from megatron_hybrid.base.errors import shown  # noqa: E402
from megatron_hybrid.base.section import Section  # noqa: E402
from megatron_hybrid.cli.main import overview  # noqa: E402
from megatron_hybrid.cli.table import COMMANDS  # noqa: E402
from megatron_hybrid.config.run import RunConfig  # noqa: E402

SCALARS = {type(None): "null", str: "text", bool: "true or false", int: "integer", float: "number"}
NOTICE = "<!-- Written by docs/generate.py from the code. Do not edit. -->\n"


def type_name(annotation: Any) -> str:
    """Return a type as users read it: `int or null`, `one of a, b`, `list of str`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if str(origin) == "typing.Literal":
        return "one of " + ", ".join(f"`{argument}`" for argument in arguments)
    if origin in (tuple, list):
        return f"list of {type_name(arguments[0])}"
    if origin is dict or str(origin).endswith("Mapping'>"):
        return f"map of {type_name(arguments[1])}"
    if hasattr(annotation, "__metadata__"):
        return type_name(arguments[0])
    return SCALARS.get(annotation) or getattr(annotation, "__name__", str(annotation))


def default_of(field: FieldInfo) -> str:
    """Return a field's default as YAML has it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "default: a section"
    return f"default: `{shown(list(value) if isinstance(value, tuple) else value)}`"


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """Yield the section classes that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_in(argument)


def fields(path: str, section: type[Section]) -> Iterator[str]:
    """Yield the Markdown of a section's fields, then of the sections in it."""
    inner: list[tuple[str, type[Section]]] = []
    heading = f"`{path}`" if path else "Top level"
    yield f"\n## {heading}\n\n{inspect.getdoc(section)}\n"
    for name, field in section.model_fields.items():
        whole = f"{path}.{name}" if path else name
        found = [(whole, one) for one in sections_in(field.annotation)]
        inner += found
        if not found or field.description:
            text = " ".join((field.description or "").split())
            yield f"\n**`{whole}`** ({type_name(field.annotation)}; {default_of(field)})  \n{text}\n"
    for whole, one in inner:
        yield from fields(whole, one)


def configuration() -> str:
    """Return the page of all fields."""
    return f"{NOTICE}# Configuration fields\n{''.join(fields('', RunConfig))}"


def commands() -> str:
    """Return the page of all commands: the overview and each command's `--help`."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_hybrid.cli", *name.split(), "--help"],
            **{"stdout": subprocess.PIPE, "text": True, "env": ENVIRONMENT, "cwd": ROOT},
        )
        for name in COMMANDS
    ]
    text = " ".join(COMMANDS_INTRODUCTION.split())
    pages = [f"{NOTICE}# Commands\n\n{text}\n\n```text\n{overview()}\n```\n"]
    for name, process in zip(COMMANDS, running, strict=True):
        text, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"megatron-hybrid {name} --help ended with status {process.returncode}")
        pages.append(f"\n## `megatron-hybrid {name}`\n{tool_of(name)}```text\n{text.strip()}\n```\n")
    return "".join(pages)


def tool_of(name: str) -> str:
    """Return the line that names the script in tools/ of a command, if there is one."""
    imported = f"from megatron_hybrid.cli.{COMMANDS[name].module} import main"
    tools = [tool for tool in (ROOT / "tools").glob("*.py") if imported in tool.read_text()]
    return f"In the checkout: `python tools/{tools[0].name}`\n" if tools else ""


def functions(module: str, names: Sequence[str]) -> Iterator[str]:
    """Yield the Markdown of a module: its functions and classes with signature and docstring."""
    imported = import_module(module)
    yield f"\n## `{module}`\n\n{first_sentence(imported)}\n"
    for name in names:
        what = getattr(imported, name)
        text = inspect.getdoc(what)
        yield f"\n### `{name}`\n\n```python\n{signature(name, what)}\n```\n```text\n{text}\n```\n"


def first_sentence(module: ModuleType) -> str:
    """Return the first paragraph of a module's docstring, without the legend of tensor names."""
    return " ".join((inspect.getdoc(module) or "").split("\n\n")[0].split())


def signature(name: str, what: Any) -> str:
    """Return a signature with one argument per line."""
    if isinstance(what, type) and issubclass(what, Section):
        fields = (f"    {field}: {type_name(one.annotation)}" for field, one in what.model_fields.items())
        return "\n".join((f"class {name}:", *fields))
    found = inspect.signature(what)
    lines = [f"    {argument}," for argument in map(str, found.parameters.values())]
    if star := next((i for i, one in enumerate(found.parameters.values()) if one.kind is one.KEYWORD_ONLY), None):
        lines.insert(star, "    *,")
    returns = "" if found.return_annotation is found.empty else f" -> {inspect.formatannotation(found.return_annotation)}"
    return "\n".join((f"{name}(", *lines, f"){returns}"))


def python_api() -> str:
    """Return the page of what other programs may import."""
    text = " ".join(API_INTRODUCTION.split())
    return f"{NOTICE}# Python API\n\n{text}\n{''.join(part for module in API for part in functions(module, API[module]))}"


API_INTRODUCTION = """
Names on this page keep their meaning within a minor version. Everything else is internal. `hybrid_kernels` needs torch and Triton
only. With fla, importing `hybrid_kernels.fla_backend` registers them as a backend of fla's `chunk_gated_delta_rule`.
"""
OPERATIONS = (
    *("conv_gates", "gated_delta_rule", "gated_delta_step", "gated_rmsnorm", "head_norm_rope", "kda_rule", "qk_norm_rope"),
    "sigmoid_gate",
)
API: dict[str, Sequence[str]] = {
    "megatron_hybrid.spec": (
        *("GatedDeltaNetConfig", "gated_delta_net_layer_spec", "olmo_hybrid_stack_spec", "optimizer_config_overrides"),
        "enable_cpu_backend",
    ),
    "megatron_hybrid.config.load": ("load_run",),
    "megatron_hybrid.checkpoint.index_file": ("read_index",),
    "megatron_hybrid.observe.metrics": ("read_metrics",),
    **{f"hybrid_kernels.{name}": (name,) for name in (*OPERATIONS, "linear_cross_entropy")},
    "hybrid_kernels.rmsnorm": ("rmsnorm", "residual_rmsnorm"),
}
COMMANDS_INTRODUCTION = """
`pip install` puts `megatron-hybrid` on the path. In the checkout, the scripts in `tools/` are the same commands, except for `plot`.
Options and `section.key=value` may come in any order.
"""
ENVIRONMENT = {"COLUMNS": "100", "PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HOME": "/tmp"}
PAGES = {"configuration": configuration, "commands": commands, "python-api": python_api}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / "docs" / "reference" / f"{name}.md").write_text(page())
