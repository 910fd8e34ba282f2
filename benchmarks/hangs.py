"""Stop and kill a rank inside a collective: detection, stacks, name of the lagging rank, status that requeues, and resume.

python benchmarks/hangs.py [--cpu]      two GPUs over NCCL, about 3 minutes; --cpu: two CPU ranks over gloo

Each case trains a small model with tools/launch.py, disturbs rank 1 in the middle of a step, and resumes the run. Writes
benchmarks/results/hangs-<machine>.json.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import report
from origins import gpu_name

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S, SLACK_S, REQUEUE = 10.0, 10.0, 75
CASES = {
    "SIGSTOP, TP2": (signal.SIGSTOP, ["parallel.tensor_parallel_size=2"]),
    "SIGSTOP, DP2": (signal.SIGSTOP, []),
    "SIGKILL, DP2": (signal.SIGKILL, []),
}
MODEL = "model={base_preset: olmo_hybrid_tiny, layer_pattern: GGGA}"


def command(folder: Path, run_dir: Path, steps: int, fields: list[str], cpu: bool) -> list[str]:
    """Return the command that trains to a step."""
    tokens = folder / "tokens.npy"
    if not tokens.exists():
        (np.random.default_rng(0).integers(-3, 4, 400_000).cumsum() % 251).astype("<u2").tofile(tokens)
    values = [
        f"run_dir={run_dir}",
        f"data.train=[{{path: {tokens}}}]",
        "data.sequence_length=128",
        f"train.steps={steps}",
        "train.global_batch_size=8",
        f"train.dtype={'fp32' if cpu else 'bf16'}",
        f"train.hang_timeout={TIMEOUT_S}",
        "checkpoint.interval=20",
        "logging.plot_interval=0",
        "logging.tensorboard=false",
        "preflight.enabled=false",
    ]
    ranks = ["--cpu-ranks", "2"] if cpu else ["--gpus", "2"]
    return [sys.executable, "tools/launch.py", *ranks, "tools/pretrain.py", "olmo_hybrid_tiny", MODEL, *values, *fields]


def logged_step(run_dir: Path) -> int:
    """Return the last complete step in metrics.jsonl; 0 if there is none."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return next((json.loads(line)["step"] for line in reversed(lines) if line.endswith("\n")), 0)


def child(launcher: int, rank: int) -> int:
    """Return the process ID of a rank by the environment of the launcher's children."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    raise LookupError(f"launcher {launcher} has no rank {rank}")


def disturb(name: str, folder: Path, cpu: bool) -> list[dict]:
    """Disturb one run, resume it, and return the rows of the case."""
    signum, fields = CASES[name]
    run_dir, log = folder / name.replace(", ", "-"), folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command(folder, run_dir, 10**6, fields, cpu), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while logged_step(run_dir) < 30 and process.poll() is None:
                time.sleep(0.05)
            if process.poll() is not None:
                raise SystemExit(f"{name}: the run ended by itself:\n{log.read_text()[-3000:]}")
            os.kill(child(process.pid, 1), signum)
            began = time.monotonic()
            status = process.wait(120)
        finally:
            if process.poll() is None:
                process.kill()
    seconds, text = time.monotonic() - began, log.read_text()
    print(f"{name}: status {status} after {seconds:.1f} s")
    print(
        "".join(line for line in text.splitlines(keepends=True) if "hangs:" in line or line.startswith("launch:")),
        flush=True,
    )
    stopped = signum == signal.SIGSTOP
    named = "rank 1 on" in text and (not stopped or "sent no report" in text)
    collective = not stopped or "waits in" in text
    resumed = subprocess.run(
        command(folder, run_dir, 60, fields, cpu), cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    print(resumed.stderr[-2000:] if resumed.returncode else f"{name}: resumed", flush=True)
    wrong = {
        "status is not 75": status != REQUEUE,
        "rank 1 not named": not named,
        "no stack of the other rank": 'File "' not in text,
        "no collective of the other rank": not collective,
        "not resumed": resumed.returncode != 0 or "resumed from" not in resumed.stdout,
    }
    rows = [report.bounded(name, metric, "", int(is_wrong), 0) for metric, is_wrong in wrong.items()]
    limit = TIMEOUT_S + SLACK_S if stopped else SLACK_S
    return [report.bounded(name, "time from the signal to the end", "s", seconds, limit), *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="CPU ranks over gloo")
    parser.add_argument("--only", choices=tuple(CASES), help="one case")
    arguments, _ = parser.parse_known_args()
    machine = None
    if arguments.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        machine = gpu_name()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for name in CASES
            if arguments.only in (None, name)
            for row in disturb(name, Path(folder), arguments.cpu)
        ]
    report.write("hangs", rows, ("torch", "megatron-core"), machine)
    sys.exit(any(row["met"] is False for row in rows))


if __name__ == "__main__":
    main()
