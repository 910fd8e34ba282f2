"""setup.py against what is installed, the wheel's contents, and nothing of one machine in the tracked files."""

import ast
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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
    """setup.py's requirements by extra; `` for the base. Read, not run."""
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("REQUIREMENTS", "EXTRAS")
    }
    return {k: [Requirement(r) for r in v] for k, v in ({"": values["REQUIREMENTS"]} | values["EXTRAS"]).items()}


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("extra", requirements())
def test_pins_agree_with_what_is_installed(extra):
    wrong = {}
    for requirement in requirements()[extra]:
        try:
            installed = version(requirement.name).split("+")[0]
        except PackageNotFoundError:
            if extra in ("", "dev"):
                wrong[requirement.name] = "not installed"
            continue
        if installed not in requirement.specifier:
            wrong[requirement.name] = f"{installed} installed, setup.py says {requirement.specifier}"
    assert not wrong


def test_every_dependency_has_a_pin():
    loose = [str(r) for r in requirements()[""] if not str(r.specifier).startswith("==")]
    assert not loose


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
                    missing.add(f"{path.relative_to(ROOT)} imports {top}, which setup.py does not name")
    assert not missing


def test_the_wheel_holds_both_packages(tmp_path):
    # From a copy: a build leaves its files beside the sources.
    source = tmp_path / "source"
    for path in [ROOT / n for n in ("setup.py", "pyproject.toml", "LICENSE")]:
        source.mkdir(exist_ok=True)
        (source / path.name).write_bytes(path.read_bytes())
    for folder in ("megatron_hybrid", "kernels"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"  # as pip calls it
    done = subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "megatron_hybrid").rglob("*.py")}
    wanted |= {str(p.relative_to(ROOT / "kernels")) for p in (ROOT / "kernels").rglob("*.py")}
    assert not wanted - held
    assert {name.split("/")[0] for name in held if ".dist-info" not in name} == {"megatron_hybrid", "hybrid_kernels"}
    assert any(name.endswith("licenses/LICENSE") for name in held)


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
