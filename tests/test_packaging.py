"""Requirements against constraints and what is installed, the wheels' contents, and nothing of one machine in the tracked files."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from email.message import Message
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import megatron_hybrid

ROOT = Path(__file__).resolve().parent.parent
# In pieces, so that this file does not find itself.
OF_ONE_MACHINE = re.compile(
    "|".join(
        [
            r"(?<![\w.~$}])/(?:root|work|mnt|Users)" + r"/\w",
            r"(?<![\w.~$}])/home" + r"/(?!user\b|me\b|you\b)\w",
            r"/opt" + r"/(?:wheels|pypi)",
            r"pypi" + r"\.org|files\.python" + r"hosted|download\.py" + r"torch\.org|pypi\." + r"nvidia\.com",
            r"(?:extra-)?index" + r"-url\s*[= ]\s*(?:https?|file):",
            r"find" + r"-links",
        ]
    )
)


def requirements() -> dict[str, list[Requirement]]:
    """Return the requirements in pyproject.toml by extra; `` for the base."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"]} | project["optional-dependencies"]
    return {extra: [Requirement(line) for line in lines] for extra, lines in groups.items()}


def locked(name: str) -> dict[str, str]:
    """Return the versions in a constraints file by canonical name."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(one.name): next(iter(one.specifier)).version for one in found}


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


LOCKS = {
    "constraints.txt": set(requirements()) - {"olmo-core"},
    "constraints-olmo-core.txt": {"", "dev", "olmo-core", "mpi"},
}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_is_locked_within_its_range(lock):
    versions = locked(lock)
    wanted = [one for extra in LOCKS[lock] for one in requirements()[extra]]
    wrong = {str(one): versions.get(canonicalize_name(one.name)) for one in wanted
             if versions.get(canonicalize_name(one.name), "none") not in one.specifier}  # fmt: skip
    assert wanted and not wrong, "run tools/lock.sh"


@pytest.mark.parametrize("extra", requirements())
def test_pins_agree_with_what_is_installed(extra):
    wrong, locks = {}, [locked(lock) for lock in LOCKS]
    for requirement in requirements()[extra]:
        name = canonicalize_name(requirement.name)
        try:
            installed = version(name).split("+")[0]
        except PackageNotFoundError:
            if extra in ("", "dev"):
                wrong[name] = "not installed"
            continue
        if installed not in (pins := {lock[name] for lock in locks if name in lock}):
            wrong[name] = f"{installed} installed, constraints: {pins}"
    assert not wrong


def test_every_dependency_has_a_range_or_a_pin():
    bounds = {str(one): {part.operator for part in one.specifier} for one in requirements()[""]}
    assert bounds and all({">=", "<"} <= operators or "==" in operators for operators in bounds.values())


def test_what_is_imported_is_required():
    names = {
        "yaml": "pyyaml",
        "megatron": "megatron-core",
        "pydantic_core": "pydantic",
        "transformer_engine_torch": "transformer-engine",  # in its extra "pytorch"
    }
    own = {"megatron_hybrid", "hybrid_kernels"}
    required = {r.name.lower().replace("-", "_") for group in requirements().values() for r in group}
    required |= {"fla", "triton"}  # flash-linear-attention's package; torch brings Triton
    missing = set()
    for path in [*ROOT.glob("megatron_hybrid/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for module in modules:
                top = module.split(".")[0]
                package = names.get(top, top).lower().replace("-", "_")
                if top not in sys.stdlib_module_names and top not in own and package not in required:
                    missing.add(f"{path.relative_to(ROOT)} imports {top}, which pyproject.toml does not name")
    assert not missing


def build_wheel(source: Path, target: Path) -> zipfile.ZipFile:
    """Build the wheel of a copy of a folder, as pip does: a build leaves its files next to the sources."""
    copy = target / "source"
    tops = {path.name for path in source.iterdir()} - {"megatron_hybrid", "kernels", "hybrid_kernels"}
    unwanted = {name for name in tops if (source / name).is_dir()}
    caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, copy, ignore=lambda path, names: unwanted if Path(path) == source else caches(path, names))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, target], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = target.glob("*.whl")
    return zipfile.ZipFile(wheel)


def tracked_below(folder: str) -> set[str]:
    """Return the tracked files of a package, relative to the folder above it."""
    start = (ROOT / folder).parent
    return {str(path.relative_to(start)) for path in tracked_files() if path.is_relative_to(ROOT / folder)}


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_string(wheel.read(name).decode())


def test_the_wheel_holds_both_packages(tmp_path):
    wheel = build_wheel(ROOT, tmp_path)
    held = set(wheel.namelist())
    wanted = tracked_below("megatron_hybrid") | tracked_below("kernels/hybrid_kernels")
    assert {name for name in wanted - held if not name.endswith(".md")} == set()
    assert {"megatron_hybrid/py.typed", "megatron_hybrid/planner/gpus/h200.yaml"} <= held
    assert {name.split("/")[0] for name in held if ".dist-info" not in name} == {"megatron_hybrid", "hybrid_kernels"}
    assert any(name.endswith("licenses/LICENSE") for name in held)
    (entry,) = (name for name in held if name.endswith("entry_points.txt"))
    assert "megatron-hybrid = megatron_hybrid.cli.main:main" in wheel.read(entry).decode()
    assert "Pretrain hybrid language models" in metadata(wheel).get_payload()


def test_the_kernels_are_a_wheel_of_their_own(tmp_path):
    wheel = build_wheel(ROOT / "kernels", tmp_path)
    held, about = set(wheel.namelist()), metadata(wheel)
    assert {name for name in tracked_below("kernels/hybrid_kernels") - held if not name.endswith(".md")} == set()
    assert {name.split("/")[0] for name in held if ".dist-info" not in name} == {"hybrid_kernels"}
    assert any(name.endswith(".cu") for name in held) and "hybrid_kernels/py.typed" in held
    needed = {Requirement(line).name for line in about.get_all("Requires-Dist") if "extra ==" not in line}
    assert needed == {"torch", "triton"} and "# hybrid-kernels" in about.get_payload()
    assert about["Version"] == megatron_hybrid.__version__
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_the_version_is_released():
    """pyproject.toml of the kernels, CITATION.cff, CHANGELOG.md and the release notes name the version of the package."""
    version = megatron_hybrid.__version__
    assert f'version = "{version}"' in (ROOT / "kernels" / "pyproject.toml").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## \[{version}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert f"\n## {version}\n" in (ROOT / "docs" / "release-notes.md").read_text()


def test_every_folder_with_code_is_a_package():
    roots = ("megatron_hybrid", "kernels/hybrid_kernels")
    folders = {path.parent for root in roots for path in (ROOT / root).rglob("*.py")}
    lacking = [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]
    assert not lacking, "a wheel leaves out folders without __init__.py"


def test_nothing_of_one_machine_in_tracked_files():
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        hits = [(number, match[0]) for number, line in enumerate(lines, 1) if (match := OF_ONE_MACHINE.search(line))]
        found += [f"{path.relative_to(ROOT)}:{number}: {hit}" for number, hit in hits]
    assert not found


def test_no_large_files_are_tracked():
    large = {str(p.relative_to(ROOT)): p.stat().st_size for p in tracked_files() if p.stat().st_size > 1_000_000}
    assert not large


def test_shell_scripts_parse():
    scripts = [p for p in tracked_files() if p.suffix == ".sh" or p.parent.name == ".ci"]
    broken = {str(p.relative_to(ROOT)): e for p in scripts if (e := _bash_error(p))}
    assert scripts and not broken


def _bash_error(path: Path) -> str:
    return subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr
