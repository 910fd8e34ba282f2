"""Origins of results: commit, machine and versions. Runs of a grid keep theirs in `origin.json`, since a report is often written
elsewhere and later.

- `origin_of_process`: of the running process.
- `gpu_name`: the GPU's name, for processes that leave it to others.
- `write_origin`, `read_origins`: of a run, and of all runs of a report together.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = "origin.json"


@dataclass(frozen=True)
class Origin:
    """Commit, machine and versions of a measurement."""

    commit: str | None
    """Short hash; None: the tree is no checkout."""
    machine: str
    """Name of the GPU, or the cores of the CPU."""
    versions: dict[str, str | None]
    """Of Python and packages; None: a package is not installed."""

    @property
    def is_cpu(self) -> bool:
        return "CPU cores" in self.machine


def origin_of_process(packages: Iterable[str], machine: str | None = None, commit: str | None = None) -> Origin:
    """Return the origin of what this process measures.

    Args:
        packages: packages whose versions are recorded.
        machine: None: this CPU.
        commit: None: that of git.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    cores = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return Origin(commit or _commit(), machine or cores, versions)


def gpu_name() -> str:
    """Return the GPU's name from its driver. Asking CUDA would give this process a share of the GPU.

    Raises:
        subprocess.CalledProcessError: there is no GPU.
    """
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


def _commit() -> str | None:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip() or None


def write_origin(folder: Path, origin: Origin) -> None:
    """Write origin.json of a run."""
    (folder / FILE).write_text(json.dumps(asdict(origin), indent=1) + "\n")


def read_origins(folders: Iterable[Path]) -> Origin:
    """Return the origin of runs together. Where their commits or versions differ, all are named.

    Raises:
        ValueError: a run has no origin.json, or runs are of several machines.
    """
    found = []
    for folder in folders:
        if not (folder / FILE).exists():
            raise ValueError(f"{folder}: has no {FILE}; train it again with its grid or ladder, which writes it")
        found.append(Origin(**json.loads((folder / FILE).read_text())))
    if len(machines := {origin.machine for origin in found}) != 1:
        raise ValueError(f"the runs are of several machines ({', '.join(sorted(machines))}); keep them apart")
    names = dict.fromkeys(name for origin in found for name in origin.versions)
    versions = {name: _joined(origin.versions.get(name) for origin in found) for name in names}
    return Origin(_joined(origin.commit for origin in found), *machines, versions)


def _joined(values: Iterable[str | None]) -> str | None:
    return ", ".join(sorted({value for value in values if value})) or None
