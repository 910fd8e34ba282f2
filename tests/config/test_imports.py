"""The configuration is loaded without torch, and a wrong one ends before anything else starts.

How long that takes is measured by benchmarks/bad_input.py.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_hybrid" / "config"
LIBRARIES = {"annotated_types", "pydantic", "pydantic_core", "typing_extensions", "typing_inspection", "yaml"}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_no_module_imports_more_than_pydantic_and_yaml() -> None:
    """Modules of site-packages count, unless the installation loads them into every process."""
    modules = [f"megatron_hybrid.config.{path.stem}" for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    assert len(modules) > 10
    done = python(f"""
import sys
always = set(sys.modules)
import {", ".join(modules)}
new = [(name, getattr(module, "__file__", None) or "") for name, module in sys.modules.items() if name not in always]
print(*sorted({{name.partition(".")[0] for name, file in new if "site-packages" in file}}))
""")
    assert done.returncode == 0, done.stderr
    assert "pydantic" in done.stdout.split() and set(done.stdout.split()) <= LIBRARIES


def test_wrong_config_fails_without_a_traceback() -> None:
    code = """
from megatron_hybrid.base.errors import no_traceback
from megatron_hybrid.config.load import load_run
with no_traceback():
    load_run("examples/configs/pretrain_hybrid_7b.yaml", ["model.layer_pattern=GGGA*999999999"]).check_world(64)
"""
    done = python(code)
    assert done.returncode == 78 and done.stdout == ""
    assert done.stderr.startswith("-c: model.layer_pattern: 'GGGA*999999999' makes more than")
    assert "Traceback" not in done.stderr
