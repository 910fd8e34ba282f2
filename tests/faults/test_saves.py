"""A short version of the campaign of faults in saves (campaign.sh runs the long one)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler for the shim")
def test_saves_survive_faults():
    command = [
        sys.executable,
        "-m",
        "tests.faults.saves",
        "--kills",
        "6",
        "--damages",
        "48",
        "--resumes",
        "3",
        "--failures",
        "8",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("passed") == 3
