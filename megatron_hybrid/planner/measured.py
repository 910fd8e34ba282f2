"""Measured mode: the best layouts through the real trainer, and what that says about the predictions.

A calibration file holds every measured step beside its prediction by part, and the factors fitted to them: how much longer
than predicted computation, communication, launches and the optimizer take, each near 1 unless the steps say otherwise.
"""

import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hybrid.base import yaml_text
from megatron_hybrid.base.errors import ConfigError, UserError
from megatron_hybrid.config.command_line import read_text
from megatron_hybrid.config.load import dump_run
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.planner.emit import emitted
from megatron_hybrid.planner.fit import towards_one
from megatron_hybrid.planner.hardware import Hardware
from megatron_hybrid.planner.search import Candidate
from megatron_hybrid.planner.timing import StepTime

COMPUTE = ("products", "attention", "delta rule", "glue")
GROUPS = ("compute", "communication", "host", "optimizer")
PULL = 0.02
"""How strongly factors are held at 1: as a fiftieth of a measured step."""


def grouped(step: StepTime) -> dict[str, float]:
    """A step's seconds by the factor that scales them. A bubble is waiting for computation."""
    found = dict.fromkeys(GROUPS, 0.0)
    for part, seconds in step.parts.items():
        if part in COMPUTE or part == "bubble":
            found["compute"] += seconds
        elif part == "launches":
            found["host"] += seconds
        else:
            found["optimizer" if part == "optimizer" else "communication"] += seconds
    return found


def fitted(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Factors from runs of {`predicted`: seconds by group before calibration, `seconds`, `peak_bytes`, `memory`: predicted}."""
    columns = [[run["predicted"][group] for run in runs] for group in GROUPS]
    factors = dict(zip(GROUPS, towards_one(columns, [run["seconds"] for run in runs], PULL * max(1, len(runs)))))
    over = [run["peak_bytes"] / run["memory"] for run in runs if run.get("peak_bytes")]
    return factors | {"memory": max([1.0, *over])}  # never less than predicted: what fits must not run out


def read_calibration(path: Path, hardware: Hardware) -> list[dict[str, Any]]:
    """Return the runs of a calibration file; none if it does not exist yet, or is empty.

    Raises:
        ConfigError: it is another GPU's, or was measured on another device, or is no calibration file.
    """
    if not path.exists():
        return []
    data = yaml_text.read(read_text("calibration", path), str(path))
    if data is None:
        return []
    if not isinstance(data, dict) or data.get("gpu") != hardware.name:
        gpu = data.get("gpu") if isinstance(data, dict) else None
        raise ConfigError.at(
            str(path), f"is a calibration of {gpu}, not of {hardware.name}; give another --calibration"
        )
    runs = data.get("runs") or []
    if not isinstance(runs, list) or not all(map(_is_run, runs)):
        raise ConfigError.at(
            str(path), "is damaged: its runs are not what --measure writes; remove it, and measure again"
        )
    for run in runs:
        if not is_device(run.get("device", hardware.name), hardware):
            raise ConfigError.at(
                str(path),
                f"{run['layout']} was measured on {run['device']}, not on {hardware.name}; remove that run from it, or give another "
                "--calibration",
            )
    return runs


def _is_run(run: Any) -> bool:
    """Whether it has the form of what `measure` returns."""
    if not isinstance(run, dict) or not isinstance(run.get("predicted"), dict):
        return False
    numbers = [run.get("seconds"), run.get("memory"), run.get("peak_bytes", 0), *map(run["predicted"].get, GROUPS)]
    texts = [run.get("layout"), run.get("device", "")]
    return all(type(x) in (int, float) and x >= 0 for x in numbers) and all(isinstance(text, str) for text in texts)


def is_device(device: str, hardware: Hardware) -> bool:
    """Whether a device, by the name that CUDA gives it, is one of this hardware's."""
    return device.strip().lower() == hardware.name.strip().lower()


def check_devices_here(hardware: Hardware, gpus: int) -> None:
    """Check that this machine has the GPUs that are asked about: what is measured here becomes their calibration.

    Raises:
        ConfigError: it has others, or too few.
    """
    ask = (
        "import torch; n = torch.cuda.device_count()\n"
        "print(*{torch.cuda.get_device_name(i) for i in range(n)} or ['cpu'], n, sep='|')"
    )
    asked = subprocess.run([sys.executable, "-W", "ignore", "-c", ask], capture_output=True, text=True)
    if asked.returncode:
        raise UserError(f"PyTorch could not be asked for this machine's GPUs:\n{_last_words(asked.stderr)}")
    *devices, count = asked.stdout.strip().splitlines()[-1].split("|")
    here = "a CPU and no GPU" if devices == ["cpu"] else f"{count} x {' and '.join(devices)}"
    if not all(is_device(device, hardware) for device in devices):
        raise ConfigError.at(
            "measure",
            f"this machine has {here}, and the question is about {hardware.name}: its steps would calibrate the wrong device; "
            "measure on such a machine, or give --gpu or --hardware of this one (tools/calibrate.py makes it)",
        )
    if devices != ["cpu"] and int(count) < gpus:
        raise ConfigError.at(
            "measure", f"this machine has {here}, and --gpus is {gpus}; measure on {gpus}, or set --gpus to {count}"
        )


def write_calibration(path: Path, hardware: Hardware, runs: Sequence[Mapping[str, Any]]) -> None:
    """Runs and the factors fitted to them."""
    text = yaml_text.write({"gpu": hardware.name, "factors": fitted(runs), "runs": list(runs)})
    path.write_text(text, encoding="utf-8")


def measure(run: RunConfig, candidate: Candidate, steps: int = 10) -> dict[str, Any]:
    """Train a few steps of a candidate on this machine's GPUs, and put the measurement beside the prediction.

    Raises:
        UserError: the run failed; its last words.
    """
    plan = candidate.plan
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.yaml"
        config.write_text(dump_run(emitted(run, plan)), encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(plan.world_size)]
        command = [
            sys.executable,
            *launcher,
            "-m",
            "megatron_hybrid.profiling.engine_steps",
            str(config),
            "--steps",
            str(steps),
        ]
        done = _run(command)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise UserError(f"{plan.label}: could not be measured:\n{_last_words(done.stderr or done.stdout)}")
    found = json.loads(lines[-1])
    return {
        "layout": plan.label,
        "gpus": plan.world_size,
        "date": datetime.date.today().isoformat(),
        "device": found["device"],
        "seconds": found["seconds"],
        "peak_bytes": found["peak_bytes"],
        "predicted": grouped(candidate.step),
        "memory": candidate.memory.total,
    }


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a launcher. When this process is stopped, it stops its ranks: it must not be killed before."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            output, errors = process.communicate()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _last_words(text: str, most: int = 12) -> str:
    """What the ranks said, without what the launcher says of their end."""
    lines = text.strip().splitlines()
    end = next((i for i, line in enumerate(lines) if "elastic/multiprocessing" in line), len(lines))
    return "\n".join(lines[:end][-most:])


def comparison(runs: Sequence[Mapping[str, Any]], factors: Mapping[str, float]) -> str:
    """Measured beside predicted, before and after calibration."""
    lines = ["measured:"]
    for run in runs:
        before = sum(run["predicted"].values())
        after = sum(seconds * factors.get(group, 1.0) for group, seconds in run["predicted"].items())
        errors = ", ".join(
            f"{name} {x / run['seconds'] - 1:+.1%}" for name, x in (("before", before), ("after", after))
        )
        memory = (
            f"; {run['peak_bytes'] / 1e9:.1f} GB, predicted {run['memory'] / 1e9:.1f}" if run.get("peak_bytes") else ""
        )
        lines.append(f"  {run['layout']}: {run['seconds']:.3f} s a step, predicted {before:.3f} ({errors}){memory}")
    return "\n".join(lines)
