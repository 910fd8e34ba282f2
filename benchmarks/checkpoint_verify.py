"""Time of verifying a checkpoint against reading it alone, and cost of a background save for the steps around it.

python benchmarks/checkpoint_verify.py --gigabytes 97 --folder /scratch/verify      a file system with room for the checkpoint
torchrun --nproc-per-node 2 benchmarks/checkpoint_verify.py --gigabytes 97 --folder /scratch/verify --steps 60 [--rounds 1]

The ranks make `--gigabytes` of files. They then read their shares, and hash them. The files are dropped from the page cache before
each pass. Background saves are timed with a training loop in place of a model: each rank holds its share of `--save-gigabytes`
and multiplies matrices on its device.
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import report
import torch
import torch.distributed as dist

from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.checkpoint.format import Index
from megatron_hybrid.checkpoint.index_file import read_index
from megatron_hybrid.checkpoint.manager import CheckpointManager
from megatron_hybrid.checkpoint.removal import remove_folder
from megatron_hybrid.checkpoint.shared_verification import find_damage_together
from megatron_hybrid.checkpoint.verification import share_of_files
from megatron_hybrid.checkpoint.writer import FILE_BYTES, SlicedTensor, finish, write_rank
from megatron_hybrid.config.checkpoint import CheckpointConfig
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.distributed.device import has_cuda, local_device, synchronize
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.start import start_distributed

COLUMNS = 1 << 20


def make_checkpoint(folder: Path, nbytes: int) -> Path:
    """Write a checkpoint of random bf16 values in files of 4 GiB, or several smaller ones if it is small."""
    saving, target = folder / ".saving-step-00000001", folder / "step-00000001"
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = max(8, nbytes // (2 * COLUMNS))
    each = min(FILE_BYTES // (2 * COLUMNS), -(-rows // 8))
    parts = -(-rows // each)
    values = torch.randint(0, 256, (each, 2 * COLUMNS), dtype=torch.uint8).view(torch.bfloat16)  # of every file
    saving.mkdir(parents=True, exist_ok=True)

    def write(number: int) -> None:
        part = TensorSlice((number * each, 0), (min(each, rows - number * each), COLUMNS))
        write_rank(saving, number, [SlicedTensor("w", (rows, COLUMNS), part, values[: part.shape[0]])], {})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(rank, parts, ranks)))
    dist.barrier()
    if rank == 0:
        finish(saving, target, Index({}, {}, {}), parts)
    dist.barrier()
    return target


def drop_from_cache(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_share(folder: Path) -> None:
    """Read this rank's files in the threads and blocks that hashing uses."""

    def read(name: str) -> None:
        block = memoryview(bytearray(4 << 20))
        with open(folder / name, "rb", buffering=0) as file:
            while file.readinto(block):
                pass

    names = share_of_files(read_index(folder).all_files(), dist.get_rank(), dist.get_world_size())
    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
        list(pool.map(read, names))


def seconds(work: Callable[[], object]) -> float:
    """Return the time of the slowest rank."""
    dist.barrier()
    begin = time.perf_counter()
    work()
    synchronize()
    dist.barrier()
    return time.perf_counter() - begin


class Shares:
    """In place of a collector: this rank's share of a state, on its device."""

    def __init__(self, nbytes: int) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        rows = max(1, nbytes // size // (4 * COLUMNS))
        self.tensors = [
            SlicedTensor("w", (rows * size, COLUMNS), TensorSlice((rank * rows + row, 0), (1, COLUMNS)), data)
            for row, data in enumerate(torch.ones(rows, COLUMNS, device=local_device()).split(1))
        ]

    def shards(self):
        return iter([SlicedTensor(t.name, t.tensor_shape, t.slice, t.data) for t in self.tensors])


def anywhere(condition: bool) -> bool:
    """Return whether the condition holds on any rank."""
    flag = torch.tensor(float(condition), device=local_device())
    dist.all_reduce(flag)
    return bool(flag.item())


def time_background_save(folder: Path, nbytes: int, steps: int) -> list[dict]:
    """Return rows on background saves: how long the step waits, and how much later steps slow down."""
    manager = CheckpointManager(CheckpointConfig(async_save=True), folder, Shares(nbytes), {}, {})
    size = 8192 if has_cuda() else 512
    x = torch.randn(size, size, device=local_device())

    def step() -> None:
        y = x
        for _ in range(20):
            y = y @ x / size
        synchronize()
        manager.check()

    for _ in range(3):
        step()
    usual = sorted(seconds(step) for _ in range(steps))[steps // 2]
    stalls = []
    for number in (1, 2):  # the second finds its host memory in use
        stalls.append(seconds(lambda number=number: manager.save(number, {}, {})))
        during, begin = [], time.perf_counter()
        while anywhere(manager._writes.in_progress) and time.perf_counter() - begin < 600:
            during.append(seconds(step))
        wrote = time.perf_counter() - begin
    manager.close()
    mean = sum(during) / max(1, len(during))
    case = f"background save of {nbytes / 1e9:.1f} GB, {dist.get_world_size()} ranks"
    return [
        report.row(case, "stall of the step, first save", "s", stalls[0]),
        report.row(case, "stall of the step, later saves", "s", stalls[1]),
        report.row(case, "time until it is complete", "s", wrote),
        report.row(case, "step without a save (median)", "s", usual),
        report.row(case, "step during the save (mean)", "s", mean, peer=usual, peer_name="step without a save"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--save-gigabytes", type=float, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3, help="of reading and of verifying")
    a, _ = parser.parse_known_args()
    launch = Launch.from_environment().export()
    start_distributed(launch, ParallelConfig(), seed=0)
    folder = a.folder / "checkpoint-verify"
    a.folder.mkdir(parents=True, exist_ok=True)
    if launch.rank == 0:
        remove_folder(folder)
        free, needed = shutil.disk_usage(a.folder).free, 1.05e9 * max(a.gigabytes, 2 * a.save_gigabytes)
        if free < needed:
            raise SystemExit(f"--folder: it has {free / 1e9:.0f} GB of space, and {needed / 1e9:.0f} are needed")
    dist.barrier()
    target = make_checkpoint(folder, int(a.gigabytes * 1e9))
    rows = time_verification(target, a.rounds)
    write(rows)
    if launch.rank == 0:
        shutil.rmtree(target)
    printed = len(rows)
    rows += time_background_save(folder, int(a.save_gigabytes * 1e9), a.steps)
    if launch.rank == 0:
        shutil.rmtree(folder)
    write(rows, printed)
    dist.barrier()


def time_verification(target: Path, rounds: int) -> list[dict]:
    """Return rows on verifying a checkpoint against reading it."""
    times: dict[str, list[float]] = {"read": [], "verify": []}
    for _ in range(rounds):
        for name, work in (
            ("read", lambda: read_share(target)),
            ("verify", lambda: find_damage_together(target, "full")),
        ):
            drop_from_cache(target)
            times[name].append(seconds(work))
    size = sum(facts["bytes"] for facts in read_index(target).files.values())
    read, verified = min(times["read"]), min(times["verify"])
    case = f"checkpoint of {size / 1e9:.1f} GB, {dist.get_world_size()} ranks, {os.cpu_count()} cores"
    peer, rates = "reading alone", (size / verified / 1e9, size / read / 1e9)
    return [
        report.row(case, "verification", "s", verified, peer=read, peer_name=peer),
        report.row(case, "verification", "GB/s", rates[0], peer=rates[1], peer_name=peer, higher_is_better=True),
    ]


def write(rows: list[dict], printed: int = 0) -> None:
    if dist.get_rank() == 0:
        machine = torch.cuda.get_device_name() if has_cuda() else None
        report.write("checkpoint_verify", rows, ("torch", "safetensors"), machine=machine, printed=printed)


if __name__ == "__main__":
    main()
