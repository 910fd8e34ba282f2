"""Measure a layout: a few steps of the real trainer on this machine's GPUs."""

import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_hybrid.base.errors import ConfigError, UserError
from megatron_hybrid.config.load import dump_run
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.planner.calibration import Run
from megatron_hybrid.planner.calibration_file import is_device
from megatron_hybrid.planner.emit import apply_plan
from megatron_hybrid.planner.hardware import Hardware
from megatron_hybrid.planner.search import Candidate

ASK_DEVICES = (
    "import torch; n = torch.cuda.device_count()\n"
    "print(*{torch.cuda.get_device_name(i) for i in range(n)} or ['cpu'], n, sep='|')"
)


def check_local_devices(hardware: Hardware, gpus: int) -> None:
    """Check that this machine has the GPUs that the request is about, since the measurements calibrate them.

    Raises:
        ConfigError: it has others, or too few.
    """
    asked = subprocess.run([sys.executable, "-W", "ignore", "-c", ASK_DEVICES], capture_output=True, text=True)
    if asked.returncode:
        raise UserError(f"PyTorch cannot list this machine's GPUs:\n{_last_lines(asked.stderr)}")
    *devices, count = asked.stdout.strip().splitlines()[-1].split("|")
    here = "a CPU and no GPU" if devices == ["cpu"] else f"{count} x {' and '.join(devices)}"
    if not all(is_device(device, hardware) for device in devices):
        raise ConfigError.at(
            "measure",
            f"this machine has {here}, and the question is about {hardware.name}: its steps would calibrate the wrong device; "
            "measure on such a machine, or give --gpu or --hardware of this one (megatron-hybrid calibrate makes it)",
        )
    if devices != ["cpu"] and int(count) < gpus:
        raise ConfigError.at(
            "measure", f"this machine has {here}, and --gpus is {gpus}; measure on {gpus}, or set --gpus to {count}"
        )


def measure(run: RunConfig, candidate: Candidate, steps: int = 10) -> Run:
    """Train a few steps of a candidate, and return the measurement with the configuration that was run.

    Raises:
        UserError: the run failed. The message has its last lines.
    """
    plan, applied = candidate.plan, apply_plan(run, candidate.plan)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.yaml"
        config.write_text(dump_run(applied), encoding="utf-8")
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(plan.world_size)]
        script = ["megatron_hybrid.profiling.engine_steps", str(config), "--steps", str(steps)]
        done = _run([sys.executable, "-m", *launcher, "-m", *script])
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise UserError(f"{plan.label}: could not be measured:\n{_last_lines(done.stderr or done.stdout)}")
    found = json.loads(lines[-1])
    return {
        "layout": plan.label,
        "gpus": plan.world_size,
        "date": datetime.date.today().isoformat(),
        "device": found["device"],
        "config": applied.model_dump(mode="json"),
        "seconds": found["seconds"],
        "peak_bytes": found["peak_bytes"],
    }


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a launcher. If this process is interrupted, it stops the launcher, which stops its ranks, and waits for it."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            output, errors = process.communicate()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _last_lines(text: str, most: int = 12) -> str:
    """Return the last lines of the ranks, without the launcher's report about their end."""
    lines = text.strip().splitlines()
    end = next((i for i, line in enumerate(lines) if "elastic/multiprocessing" in line), len(lines))
    return "\n".join(lines[:end][-most:])
