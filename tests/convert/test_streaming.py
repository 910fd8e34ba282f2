"""Memory is bounded for any model size, and ranks that share a conversion write the same bytes."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.convert import job
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf.config import hf_from_model
from megatron_hybrid.convert.hf.importer import from_huggingface
from megatron_hybrid.convert.hf.registry import architecture_for
from megatron_hybrid.convert.io.writer import OutputTensor
from megatron_hybrid.convert.job import split_into_files
from megatron_hybrid.convert.ranks import Ranks, find_ranks
from testing.models import hybrid
from tests.convert.folders import BASE, write_folder

ROOT = Path(__file__).resolve().parents[2]
LARGE = hybrid("GGGA*2", 512, 8, 48, ffn_hidden_size=4096, vocab_size=40_000)

MEASURE = """
import json, sys
from pathlib import Path
from megatron_hybrid.convert.hf.importer import from_huggingface
from megatron_hybrid.convert.job import run
from megatron_hybrid.convert.ranks import Ranks
from megatron_hybrid.convert.hf.exporter import to_huggingface
import torch

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0]) * 1024

torch.zeros(8).bfloat16()
before = resident()
direction, source, target, dtype = sys.argv[1:]
plan = from_huggingface if direction == "from" else to_huggingface
conversion = plan(Path(source), Path(target), dtype or None)
run(conversion, Ranks(), lambda total: lambda count: None)
print(json.dumps({"grown": resident() - before, "total": conversion.nbytes}))
"""


def test_memory_is_bounded(tmp_path):
    model = ModelConfig(**LARGE)
    specs = model_tensors(model)
    folder = tmp_path / "hf"
    folder.mkdir()
    names = architecture_for(model).names(model)
    save_file(
        {names.theirs(name): torch.zeros(names.holder(name).shape) for name in specs},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(hf_from_model(model, "float32", 512)))
    largest = max(s.numel for s in specs.values()) * 4

    def measure(*arguments: str) -> dict:
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=250
        )
        assert result.returncode == 0, result.stderr[-2000:]
        return json.loads(result.stdout)

    runs = [
        measure("from", str(folder), str(tmp_path / "ours"), ""),
        measure("from", str(folder), str(tmp_path / "bf16"), "BF16"),
        measure("to", str(tmp_path / "ours"), str(tmp_path / "export"), ""),
        measure("to", str(tmp_path / "ours"), str(tmp_path / "export16"), "BF16"),
    ]
    for report in runs:
        # the promise is 2 x the largest tensor + 1 GB; what is kept is a few blocks
        assert report["grown"] < min(2 * largest, 160 << 20) < report["total"], runs


def test_files_are_even_and_never_split_a_tensor():
    def tensor(number: int, size: int) -> OutputTensor:
        return OutputTensor(str(number), "U8", (size,), lambda: None)  # type: ignore[arg-type,return-value]

    files = split_into_files([tensor(i, 10) for i in range(31)], 100)
    sizes = [sum(t.nbytes for t in group) for group in files.values()]
    assert sum(sizes) == 310 and max(sizes) <= 100 and len(sizes) == 4 and min(sizes) >= 70
    assert list(files)[0] == "model-00001-of-00004.safetensors"
    assert len(split_into_files([tensor(0, 500), tensor(1, 5)], 100)) == 2


def test_ranks_share_evenly():
    ranks = [Ranks() for _ in range(3)]
    for number, rank in enumerate(ranks):
        rank.rank, rank.size = number, 3
    sizes = [5, 1, 4, 4, 2, 2]
    shares = [rank.share(sizes) for rank in ranks]
    assert sorted(sum(shares, [])) == list(range(6))
    assert [sum(sizes[i] for i in share) for share in shares] == [6, 6, 6]


def test_mpirun_without_mpi4py_is_an_error(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConversionError, match="mpi4py"):
        find_ranks()


class Communicator:
    """The part of an MPI communicator that conversions use, for ranks in threads."""

    def __init__(self, rank: int, barrier: threading.Barrier, slots: list):
        self.rank, self.barrier, self.slots = rank, barrier, slots

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.barrier.parties

    def Ibarrier(self) -> "Communicator":
        return self

    def Test(self) -> bool:
        self.barrier.wait(60)
        return True

    def allgather(self, value: object) -> list:
        self.slots[self.rank] = value
        self.barrier.wait(60)
        found = list(self.slots)
        self.barrier.wait(60)
        return found


def run_in_threads(count: int, plan: Callable[[], job.Conversion]) -> list[str]:
    """Run a conversion on ranks in threads, and return the error of each rank, or ""."""
    barrier, slots = threading.Barrier(count), [None] * count

    def work(rank: int) -> str:
        try:
            job.run(plan(), Ranks(Communicator(rank, barrier, slots)), lambda total: lambda count: None)
        except ConversionError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def test_ranks_in_threads_write_the_same_bytes_as_one_process(tmp_path, monkeypatch):
    write_folder(tmp_path / "hf", BASE)
    assert run_in_threads(1, lambda: from_huggingface(tmp_path / "hf", tmp_path / "one", max_file_bytes=8000)) == [""]
    assert (
        run_in_threads(3, lambda: from_huggingface(tmp_path / "hf", tmp_path / "three", max_file_bytes=8000))
        == [""] * 3
    )
    assert contents(tmp_path / "one") == contents(tmp_path / "three") and len(contents(tmp_path / "one")) > 6

    real = job.write_file

    def broken(path, *rest):
        if path.name.startswith("model-00002"):
            raise ConversionError("damaged")
        return real(path, *rest)

    monkeypatch.setattr(job, "write_file", broken)
    errors = run_in_threads(2, lambda: from_huggingface(tmp_path / "hf", tmp_path / "two", max_file_bytes=8000))
    assert sorted(errors) == sorted(["damaged", f"rank {errors.index('damaged')} failed: ConversionError: damaged"])
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "one", "three"}


def mpirun(count: int, *command: str, timeout: float = 120) -> subprocess.CompletedProcess:
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun here: apt-get install openmpi-bin")
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install megatron-hybrid[mpi]")
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PYTHONPATH": str(ROOT)}
    line = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(count), sys.executable, *command]
    return subprocess.run(line, cwd=ROOT, env=os.environ | allowed, capture_output=True, text=True, timeout=timeout)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_ranks_write_the_same_bytes_as_one_process(tmp_path):
    write_folder(tmp_path / "hf", BASE)
    from tools import convert_from_hf, convert_to_hf

    assert convert_from_hf.main([str(tmp_path / "hf"), str(tmp_path / "ours"), "--quiet"]) == 0
    assert (
        convert_to_hf.main([str(tmp_path / "ours"), str(tmp_path / "one"), "--quiet", "--max-shard-size", "6KB"]) == 0
    )

    result = mpirun(
        3,
        "tools/convert_to_hf.py",
        str(tmp_path / "ours"),
        str(tmp_path / "three"),
        "--quiet",
        "--max-shard-size",
        "6KB",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("GB in") == 1
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert len(contents(tmp_path / "one")) > 6

    result = mpirun(2, "tools/convert_from_hf.py", str(tmp_path / "one"), str(tmp_path / "ours2"), "--quiet")
    assert result.returncode == 0, result.stderr
    first, second = contents(tmp_path / "ours"), contents(tmp_path / "ours2")
    assert {n: b for n, b in first.items() if n.endswith("safetensors")} == {
        n: b for n, b in second.items() if n.endswith("safetensors")
    }


def test_an_error_on_any_rank_ends_all(tmp_path):
    write_folder(tmp_path / "hf", BASE)
    (tmp_path / "hf/config.json").write_text("{}")
    result = mpirun(2, "tools/convert_from_hf.py", str(tmp_path / "hf"), str(tmp_path / "ours"), "--quiet", timeout=60)
    assert result.returncode != 0
    assert result.stderr.count("error: config.json: model_type") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"hf"}
