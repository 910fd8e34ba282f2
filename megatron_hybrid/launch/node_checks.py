"""Checks of a node by one rank, without communication: device, versions, disk."""

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import megatron_hybrid
from megatron_hybrid.distributed.device import has_cuda, local_device, synchronize

PACKAGES = ("megatron-core", "transformer-engine", "flash-linear-attention", "triton", "numpy", "mpi4py")
_PROBE_BYTES = 1 << 18
_ECC = ("ecc.errors.uncorrected.volatile.total", "uncorrected ECC errors since the driver was loaded; reset the GPU")
_REMAPPED = (
    ("remapped_rows.pending", "a row remapping pends; reset the GPU"),
    ("remapped_rows.failure", "a row could not be remapped; replace the GPU"),
)


def memory_gib() -> tuple[float, float]:
    """Return free and total memory of this rank's device in GiB; on CPU, the machine's."""
    if has_cuda():
        free, total = torch.cuda.mem_get_info()
    else:
        page = os.sysconf("SC_PAGE_SIZE")
        free, total = page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")
    return free / 2**30, total / 2**30


def wrong_gemm_entries(size: int = 512) -> int:
    """Return the number of entries of a GEMM that the device gets wrong.

    The inputs are small whole numbers: every partial sum is exact in fp32 in any order, so a healthy device makes no error.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (size, size), generator=generator).double() for _ in range(2))
    found = a.to(local_device(), torch.float32) @ b.to(local_device(), torch.float32)
    return int((found.cpu().double() != a @ b).sum())


def matmul_tflops() -> float:
    """Return the TFLOP/s of a GEMM on this rank's device, in bf16 on a GPU and in fp32 on CPU."""
    size, dtype, times = (8192, torch.bfloat16, 10) if has_cuda() else (256, torch.float32, 3)
    a = torch.randn(size, size, device=local_device(), dtype=dtype)  # ones would draw less power and run faster
    best = float("inf")
    for _ in range(times + 1):  # the first is a warm-up
        synchronize()
        start = time.perf_counter()
        a @ a
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def gpu_faults() -> list[str]:
    """Return the faults of this node's GPUs that nvidia-smi reports; empty without CUDA. Counters that a GPU lacks are no faults."""
    if not has_cuda():
        return []
    if shutil.which("nvidia-smi") is None:
        return ["nvidia-smi is missing, so ECC errors cannot be read; install the driver's utilities"]
    faults = []
    for option, fields in (("gpu", (_ECC,)), ("remapped-rows", _REMAPPED)):
        names = ",".join(name for name, _ in fields)
        index = "index" if option == "gpu" else "gpu_uuid"
        command = ["nvidia-smi", f"--query-{option}={index},{names}", "--format=csv,noheader,nounits"]
        asked = subprocess.run(command, capture_output=True, text=True)
        if asked.returncode:
            faults.append(f"nvidia-smi fails ({asked.returncode}): {(asked.stdout + asked.stderr).strip()[:200]}")
            continue
        faults += faults_in(asked.stdout, fields)
    return faults


def faults_in(csv: str, fields: tuple[tuple[str, str], ...]) -> list[str]:
    """Return the faults in nvidia-smi's output: one line per GPU, with its index or ID and a count per field."""
    found = []
    for line in csv.strip().splitlines():
        gpu, *values = (value.strip() for value in line.split(","))
        for value, (_, meaning) in zip(values, fields):
            if value.lower() not in ("0", "no") and (value.isdigit() or value.lower() == "yes"):
                found.append(f"GPU {gpu}: {value} {meaning}" if value.isdigit() else f"GPU {gpu}: {meaning}")
    return found


def versions() -> dict[str, str]:
    """Return the versions that must be the same on all nodes."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "megatron_hybrid": our_version()}
    if has_cuda():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version()), "NCCL": nccl}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def our_version() -> str:
    """Return the release, and in a checkout the commit, followed by `+` if files are modified."""
    root = Path(megatron_hybrid.__file__).parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return megatron_hybrid.__version__
    git = ["git", "-c", f"safe.directory={root}", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    return f"{megatron_hybrid.__version__} {commit}{'+' if changed else ''}"


def probe_file(run_dir: Path, node: str) -> Path:
    """Return the path of the file that a node writes to test the disk."""
    return run_dir / f".preflight-{node}"


def write_probe(run_dir: Path, node: str, needed_bytes: int) -> tuple[int, str | None]:
    """Write, flush and read back a file in run_dir.

    Returns:
        The free bytes there, and the problem, if there is one.
    """
    content = os.urandom(_PROBE_BYTES)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run_dir).free
        if free < needed_bytes:
            return free, (
                f"run_dir {run_dir} has {format_bytes(free)} free, and a checkpoint takes {format_bytes(needed_bytes)}; "
                "make room, or set run_dir to a folder of another disk"
            )
        with open(probe_file(run_dir, node), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if probe_file(run_dir, node).read_bytes() != content:
            return free, f"run_dir {run_dir} returns other bytes than were written; use another disk"
    except OSError as error:
        return 0, f"run_dir {run_dir} cannot be written ({error.strerror}); make room, or set run_dir to another folder"
    return free, None


def format_bytes(size: float) -> str:
    """Format a number of bytes: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
