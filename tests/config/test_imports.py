"""The configuration loads fast and without torch, and a wrong one fails fast, before anything else starts.

Times are the processor's, of the whole process: other tests' ranks may fill the cores.
"""

import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_hybrid" / "config"
HEAVY = ("torch", "numpy", "megatron", "transformers", "triton")


def python(code: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """The finished process, and the processor's seconds it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_no_module_imports_torch() -> None:
    modules = [f"megatron_hybrid.config.{path.stem}" for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    assert len(modules) > 10
    done, _ = python(f"import {', '.join(modules)}, sys; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_import_is_fast() -> None:
    code = "import time; t = time.process_time(); import megatron_hybrid.config.load; print(time.process_time() - t)"
    assert min(float(python(code)[0].stdout) for _ in range(2)) < 0.5  # the first may write the bytecode


def test_wrong_config_fails_in_two_seconds_without_a_traceback() -> None:
    code = """
from megatron_hybrid.base.errors import no_traceback
from megatron_hybrid.config.load import load_run
with no_traceback():
    load_run("examples/configs/pretrain_hybrid_7b.yaml", ["model.layer_pattern=GGGA*999999999"]).check_world(64)
"""
    done, seconds = python(code)
    assert seconds < 2
    assert done.returncode == 78 and done.stdout == ""
    assert done.stderr.startswith("-c: model.layer_pattern: 'GGGA*999999999' makes more than")
    assert "Traceback" not in done.stderr
