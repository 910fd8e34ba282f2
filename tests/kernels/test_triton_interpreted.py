"""Triton kernels on the CPU, in separate processes, because Triton decides at its first import whether to interpret."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.cuda_sources import SHARED_BUILDS, shared_builds

pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent


FILES = sorted(path.name for path in (HERE / "interpreted").glob("test_*.py"))
FIRST = "test_interpreted_kernels.py"
"""It takes as long as the others together, which share one process, because it takes seconds to start."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("files", [[FIRST], [file for file in FILES if file != FIRST]], ids=["kernels", "others"])
def test_interpreted_kernels(root, tmp_path_factory, files):
    paths = [str(HERE / "interpreted" / file) for file in files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    environment = {**os.environ, "TRITON_INTERPRET": "1", SHARED_BUILDS: str(shared_builds(tmp_path_factory).parent)}
    ran = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
