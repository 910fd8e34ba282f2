"""A short version of the campaign of faults in runs (campaign.sh runs the long one)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"kills": 2, "signals": 3, "hangs": 2, "numbers": 3, "logs": 5}


def test_runs_survive_faults():
    counts = [word for name, count in COUNTS.items() for word in (f"--{name}", str(count))]
    command = [sys.executable, "-m", "tests.faults.runs", *counts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count(" 0 failed") == len(COUNTS)
