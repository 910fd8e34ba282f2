"""What one rank can find out about its node: device, versions, disk. Nothing here talks to the other ranks."""

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
    """(free, total) memory of this rank's device, GiB; of the machine on CPU."""
    if has_cuda():
        free, total = torch.cuda.mem_get_info()
    else:
        page = os.sysconf("SC_PAGE_SIZE")
        free, total = page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")
    return free / 2**30, total / 2**30


def wrong_products(size: int = 512) -> int:
    """Entries of a matrix product that the device gets wrong.

    Small whole numbers: every partial sum is exact in fp32, whatever the order of summation, so a healthy device errs in none.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (size, size), generator=generator).double() for _ in range(2))
    found = a.to(local_device(), torch.float32) @ b.to(local_device(), torch.float32)
    return int((found.cpu().double() != a @ b).sum())


def matmul_tflops() -> float:
    """TFLOP/s of a matrix product on this rank's device: bf16 on a GPU, fp32 on CPU."""
    size, dtype, times = (8192, torch.bfloat16, 10) if has_cuda() else (256, torch.float32, 3)
    a = torch.randn(size, size, device=local_device(), dtype=dtype)  # ones would draw less power, and so run faster
    best = float("inf")
    for _ in range(times + 1):  # the first warms up
        synchronize()
        start = time.perf_counter()
        a @ a
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def gpu_faults() -> list[str]:
    """What nvidia-smi knows against this node's GPUs; empty without CUDA. What a GPU does not report is no fault."""
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
    """The faults in nvidia-smi's answer: a GPU a line, its index or id, then a count for each field."""
    found = []
    for line in csv.strip().splitlines():
        gpu, *values = (value.strip() for value in line.split(","))
        for value, (_, meaning) in zip(values, fields):
            if value.lower() not in ("0", "no") and (value.isdigit() or value.lower() == "yes"):
                found.append(f"GPU {gpu}: {value} {meaning}" if value.isdigit() else f"GPU {gpu}: {meaning}")
    return found


def versions() -> dict[str, str]:
    """Everything whose difference between nodes makes runs differ, or hang."""
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
    """The release, and the commit where this is a checkout; `+` tells that files differ from it."""
    root = Path(megatron_hybrid.__file__).parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return megatron_hybrid.__version__
    git = ["git", "-c", f"safe.directory={root}", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    return f"{megatron_hybrid.__version__} {commit}{'+' if changed else ''}"


def probe_file(run_dir: Path, node: str) -> Path:
    """What a node writes to try the disk."""
    return run_dir / f".preflight-{node}"


def write_probe(run_dir: Path, node: str, needed_bytes: int) -> tuple[int, str | None]:
    """Write, flush and read back a file in run_dir. Returns the free bytes there, and what is wrong, if anything is."""
    content = os.urandom(_PROBE_BYTES)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run_dir).free
        if free < needed_bytes:
            return free, (
                f"run_dir {run_dir} has {in_words(free)} free, and a checkpoint takes {in_words(needed_bytes)}; "
                "make room, or set run_dir to a folder of another disk"
            )
        with open(probe_file(run_dir, node), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if probe_file(run_dir, node).read_bytes() != content:
            return free, f"run_dir {run_dir} does not read back what is written to it; use another disk"
    except OSError as error:
        return 0, f"run_dir {run_dir} cannot be written ({error.strerror}); make room, or set run_dir to another folder"
    return free, None


def in_words(size: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
