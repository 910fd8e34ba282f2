"""Which way imports point. Every file is parsed, not imported: what stands inside functions counts as well."""

import ast
import graphlib
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Room of megatron_hybrid -> the rooms it may import, besides itself.
MAY_IMPORT: dict[str, set[str]] = {
    "base": set(),
    "arch": {"base"},
    "config": {"base", "arch"},
    "planner": {"base", "arch", "config"},
    "observe": {"base", "config"},
    "data": {"base", "arch", "config"},
    "distributed": {"base", "config"},
    "launch": {"base", "config", "distributed"},
    "precision": {"base", "arch", "config"},
    "mixers": {"base", "arch", "distributed", "precision"},
    "model": {"base", "arch", "config", "distributed", "mixers", "precision"},
    "spec": {"base", "arch", "distributed", "mixers", "model"},
    "checkpoint": {"base", "arch", "config", "distributed", "model", "precision"},
    "inference": {
        *("base", "arch", "config", "data", "distributed", "launch", "mixers", "model", "checkpoint", "convert"),
    },
    "evaluation": {"base", "config", "data", "distributed", "inference", "model"},
    "train": {
        *("base", "arch", "config", "distributed", "launch", "precision", "mixers", "model", "checkpoint"),
        *("data", "evaluation", "inference", "observe", "planner"),
    },
    "profiling": {"base", "arch", "config", "data", "distributed", "launch", "mixers", "precision", "train"},
    "stages": {"base", "arch", "config", "checkpoint", "data", "observe", "train"},
    "convert": {"base", "arch", "config", "distributed", "mixers", "checkpoint", "data"},
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)  # nothing imports the commands
# Libraries that only these rooms import. (train has no business with a kernel: the model calls them.)
ONLY: dict[str, set[str]] = {
    "megatron": {"distributed", "precision", "mixers", "model", "checkpoint", "train", "spec"},
    "hybrid_kernels": {"distributed", "mixers", "model", "precision", "profiling"},
    "torch": set(MAY_IMPORT) - {"base", "arch", "config", "planner"},
}
NO_TORCH = ("torch", "transformers", "safetensors.torch", "transformer_engine", "fla", "triton", "deepspeed")
LONGEST_TOOL, LONGEST_COMMAND = 20, 110  # lines


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text(), str(path))))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports: `from a.b import c` gives a.b and a.b.c."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in nodes(path):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield node.lineno, ".".join(base)
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


def module_of(path: Path) -> str:
    """`megatron_hybrid.observe` for megatron_hybrid/observe/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts  # the folder is no package
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """Return the modules that a file imports names of. `from package import module` does not depend on the package's names."""
    found: dict[int, set[str]] = {}
    for line, name in imports(path):
        found.setdefault(line, set()).add(name.removeprefix("kernels."))
    return {
        name
        for names in found.values()
        for name in names & modules
        if not any(other.rpartition(".")[0] == name and other in modules for other in names)
    }


def cycle(folder: str) -> list[str]:
    """Return the modules of an import cycle, first and last the same; empty if there is none."""
    modules = {module_of(path): path for path in files(folder)}
    graph = {name: imported_modules(path, set(modules)) for name, path in modules.items()}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def room_of(path: Path) -> str | None:
    """`config` for megatron_hybrid/arch/model.py; None for megatron_hybrid/__init__.py."""
    parts = path.relative_to(ROOT / "megatron_hybrid").parts
    return parts[0] if len(parts) > 1 else None


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def offences(folder: str, wrong: Callable[[Path, str], bool]) -> list[str]:
    """`file:line imports name` of each import for which wrong(path, name)."""
    found = {
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files(folder)
        for line, name in imports(path)
        if wrong(path, name)
    }
    return sorted(found)


def test_an_offence_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    room = tmp_path / "megatron_hybrid" / "observe"
    room.mkdir(parents=True)
    (room / "a.py").write_text("def f():\n    from ..train import trainer\n    import megatron.core as mc\n")
    seen = offences("megatron_hybrid", lambda _, name: name.split(".")[0].startswith("megatron"))
    assert seen == [
        "megatron_hybrid/observe/a.py:2 imports megatron_hybrid.train",
        "megatron_hybrid/observe/a.py:2 imports megatron_hybrid.train.trainer",
        "megatron_hybrid/observe/a.py:3 imports megatron.core",
    ]
    with pytest.raises(AssertionError):
        test_rooms_import_only_whom_they_may()
    with pytest.raises(AssertionError):
        test_libraries_stay_in_their_rooms("megatron")


def test_every_room_is_in_the_table():
    rooms = {path.name for path in (ROOT / "megatron_hybrid").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms <= set(MAY_IMPORT), "a new room: say in MAY_IMPORT whom it may import"


def test_the_table_has_no_circle():
    list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())


def test_a_cycle_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package import b\n")
    (package / "b.py").write_text("def f():\n    from package.c import x\n")
    assert not cycle("package")
    (package / "c.py").write_text("from .a import y\n")
    assert sorted(set(cycle("package"))) == ["package.a", "package.b", "package.c"]


@pytest.mark.parametrize("folder", ["megatron_hybrid", "kernels/hybrid_kernels", "testing"])
def test_no_module_is_in_an_import_cycle(folder):
    """Imports inside functions and under TYPE_CHECKING count as well."""
    assert not cycle(folder)


def test_rooms_import_only_whom_they_may():
    def wrong(path: Path, name: str) -> bool:
        parts, room = name.split("."), room_of(path)
        if parts[0] != "megatron_hybrid" or len(parts) < 2 or parts[1] not in MAY_IMPORT:
            return False
        return room is None or parts[1] not in MAY_IMPORT[room] | {room}

    assert not offences("megatron_hybrid", wrong)


def test_one_callback_alone_imports_the_planner():
    found = offences("megatron_hybrid/train", lambda _, name: is_within(name, "megatron_hybrid.planner"))
    assert {line.partition(":")[0] for line in found} == {"megatron_hybrid/train/callbacks/run_summary.py"}


@pytest.mark.parametrize("library", ONLY)
def test_libraries_stay_in_their_rooms(library):
    def wrong(path: Path, name: str) -> bool:
        return is_within(name, library) and room_of(path) not in ONLY[library]

    assert not offences("megatron_hybrid", wrong)


@pytest.mark.parametrize("room", ["base", "arch", "config", "planner"])
def test_rooms_that_do_without_torch(room):
    if (ROOT / "megatron_hybrid" / room).exists():
        assert not offences(f"megatron_hybrid/{room}", lambda _, name: any(is_within(name, lib) for lib in NO_TORCH))


@pytest.mark.parametrize("file", ["config", "costs", "spec"])
def test_a_mixers_description_needs_no_torch(file):
    def wrong(path: Path, name: str) -> bool:
        if path.stem != file:
            return False
        own = ".".join(path.relative_to(ROOT).parts[:-1])
        known = is_within(name, own) or any(is_within(name, f"megatron_hybrid.{room}") for room in ("base", "arch"))
        parent = is_within(own, name)  # `from a.b import c` names a.b as well
        return (
            is_within(name, "megatron_hybrid")
            and not (known or parent)
            or any(is_within(name, library) for library in NO_TORCH)
        )

    assert not offences("megatron_hybrid/mixers", wrong)


def test_kernels_know_nothing_of_megatron():
    assert not offences("kernels", lambda _, name: is_within(name, "megatron") or is_within(name, "megatron_hybrid"))
    assert not (ROOT / "kernels" / "__init__.py").exists(), "a package `kernels` would shadow Hugging Face's"


@pytest.mark.parametrize("folder", ["megatron_hybrid", "kernels", "tools", "testing", "benchmarks", "examples"])
def test_nothing_imports_tests_or_tools(folder):
    assert not offences(folder, lambda _, name: is_within(name, "tests") or is_within(name, "tools"))


@pytest.mark.parametrize("folder", ["megatron_hybrid", "kernels", "tools", "examples"])
def test_only_tests_and_benchmarks_import_the_shared_harnesses(folder):
    assert not offences(folder, lambda _, name: is_within(name, "testing"))


def test_nothing_loads_a_pickle():
    def calls(path: Path) -> Iterator[str]:
        for node in nodes(path):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                weights_only = [k.value for k in node.keywords if k.arg == "weights_only"]
                if not (weights_only and isinstance(weights_only[0], ast.Constant) and weights_only[0].value is True):
                    yield f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)[:60]}"

    everything = [path for folder in ("megatron_hybrid", "kernels", "tools") for path in files(folder)]
    assert not [call for path in everything for call in calls(path)]


@pytest.mark.parametrize(("folder", "most"), [("tools", LONGEST_TOOL), ("megatron_hybrid/cli", LONGEST_COMMAND)])
def test_commands_are_thin(folder, most):
    lengths = {path.name: len(path.read_text().splitlines()) for path in files(folder)}
    assert lengths and not {name: count for name, count in lengths.items() if count > most}
