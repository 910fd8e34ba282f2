#!/usr/bin/env python
"""Converting a model of the real size, olmo_hybrid_7b in bf16 (14.9 GB of random weights), both ways.

python benchmarks/convert_7b.py --work /scratch/convert

Needs 60 GB of free disk under --work and removes what it made. For every conversion: wall time as a ratio to `cp` of the same
bytes on the same disk (both until `sync` has put them there, the source not cached), peak resident memory of the process (of
the largest rank), and at the end that what came back is bit for bit what went in. Each is timed `--repeats` times, one after
the other in turn, and the fastest counts: other work on the machine can only slow them.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from origins import origin_of_process

ROOT = Path(__file__).resolve().parents[1]
GOAL_RATIO, GOAL_GB = 1.5, 3.0


def generate(folder: Path, preset: str) -> None:
    """A Hugging Face folder of random weights, written shard by shard (in a process of its own: see main)."""
    import torch

    from megatron_hybrid.arch.tensors import model_tensors
    from megatron_hybrid.config.presets import preset as find_preset
    from megatron_hybrid.convert.hf.config import hf_from_model
    from megatron_hybrid.convert.hf.exporter import MAX_SHARD_BYTES
    from megatron_hybrid.convert.hf.registry import architecture_for
    from megatron_hybrid.convert.io.writer import OutputTensor, header_bytes
    from megatron_hybrid.convert.job import split_into_files

    model = find_preset(preset)
    names = architecture_for(model).names(model)
    noise = torch.randn((8 << 20) + 4096, generator=torch.Generator().manual_seed(0))
    pools = {"BF16": noise.bfloat16().view(torch.uint8).numpy(), "F32": noise.view(torch.uint8).numpy()}
    tensors = []
    for name, spec in model_tensors(model).items():
        dtype = "F32" if spec.always_fp32 else "BF16"
        tensors.append(OutputTensor(names.theirs(name), dtype, names.holder(name).shape, lambda: None))  # type: ignore[arg-type,return-value]
    folder.mkdir(parents=True)
    files = split_into_files(tensors, MAX_SHARD_BYTES)
    for number, (name, group) in enumerate(files.items()):
        with open(folder / name, "wb") as out:
            out.write(header_bytes(group))
            for index, tensor in enumerate(group):
                pool, left = memoryview(pools[tensor.dtype]), tensor.nbytes
                start = 4 * ((number * 997 + index * 131) % 2048)  # no two tensors alike
                while left:
                    left -= out.write(pool[start : start + min(left, 16 << 20)])
    weight_map = {t.name: file for file, group in files.items() for t in group}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(hf_from_model(model, "bfloat16", 65536)))


def out_of_cache(*folders: Path) -> None:
    """Put everything on disk and drop the pages of these folders' files."""
    os.sync()
    for folder in folders:
        for path in folder.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(command: list[str], source: Path) -> dict[str, float]:
    """Seconds until the result is on disk, processor seconds, and peak resident bytes of the largest process."""
    out_of_cache(source)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    begin = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.monotonic() - begin
    if status:
        sys.exit(f"{' '.join(command)} failed with status {status}")
    print(f"{seconds:7.1f} s  {usage.ru_maxrss / 1e6:5.2f} GB  {' '.join(command)[:150]}", flush=True)
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "rss": usage.ru_maxrss * 1024}


def measure(work: Path, ranks: list[int], repeats: int) -> tuple[dict[str, list[dict[str, float]]], bool]:
    """Time everything; every result but one of each kind is removed as soon as it is measured."""
    source, ours, back = work / "hf", work / "ours", work / "back"
    results: dict[str, list[dict[str, float]]] = {}

    def one(name: str, command: list[str], reads: Path, makes: Path) -> None:
        shutil.rmtree(makes, ignore_errors=True)
        results.setdefault(name, []).append(timed(command, reads))

    def tool(script: str, count: int) -> list[str]:
        mpirun = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(count)] if count > 1 else []
        return [*mpirun, sys.executable, f"tools/{script}"]

    for _ in range(repeats):
        one("cp", ["cp", "-r", str(source), str(back)], source, back)
        shutil.rmtree(back)
        for count in ranks:
            one(
                f"from_hf, {count}",
                [*tool("convert_from_hf.py", count), str(source), str(ours), "--quiet"],
                source,
                ours,
            )
        for count in ranks:
            one(f"to_hf, {count}", [*tool("convert_to_hf.py", count), str(ours), str(back), "--quiet"], ours, back)
    names = [path.name for path in source.glob("*.safetensors")]
    same = all(subprocess.run(["cmp", "-s", str(source / n), str(back / n)]).returncode == 0 for n in names)
    return results, same


def rows(results: dict[str, list[dict[str, float]]], same: bool) -> list[dict[str, Any]]:
    """Rows of the result file. Ratios: above 1 means ours is better."""
    copied = min(r["seconds"] for r in results["cp"])
    best = {name: min(r["seconds"] for r in runs) for name, runs in results.items()}
    table: list[dict[str, Any]] = []

    def add(
        case: str,
        metric: str,
        unit: str,
        ours: float,
        peer: float | None,
        name: str | None,
        goal: float | None,
        met: bool | None,
    ):
        ratio = None if peer is None else peer / ours
        table.append(
            dict(
                case=case,
                metric=metric,
                unit=unit,
                ours=ours,
                peer=peer,
                peer_name=name,
                ratio=ratio,
                goal=goal,
                met=met,
            )
        )

    for name, runs in results.items():
        if name == "cp":
            continue
        case = f"{name} rank{'s' if name[-1] != '1' else ''}"
        add(case, "time", "s", best[name], copied, "cp", 1 / GOAL_RATIO, best[name] <= GOAL_RATIO * copied)
        add(
            case,
            "processor time",
            "s",
            min(r["cpu"] for r in runs),
            min(r["cpu"] for r in results["cp"]),
            "cp",
            None,
            None,
        )
        peak = max(r["rss"] for r in runs) / 1e9
        add(case, "peak resident memory of a process", "GB", peak, None, None, GOAL_GB, peak < GOAL_GB)
        alone = best[name.rpartition(" ")[0] + " 1"]
        if name[-1] != "1":
            add(case, "time against 1 rank", "s", best[name], alone, "1 rank", 1.0, best[name] < alone)
    add("from_hf then to_hf", "equal bytes", "1", float(same), None, None, 1.0, same)
    return table


def main() -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made; on the disk to measure")
    parser.add_argument("--preset", default="olmo_hybrid_7b")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/convert_7b-cpu.json")
    parser.add_argument("--generate", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.generate:
        generate(a.work / "hf", a.preset)
        return 0
    if a.work.exists():
        sys.exit(f"{a.work} exists; name a folder to make")
    try:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, __file__, "--generate", "--work", str(a.work), "--preset", a.preset],
            check=True,
            env=environment,
        )
        nbytes = sum(path.stat().st_size for path in (a.work / "hf").iterdir())
        results, same = measure(a.work, a.ranks, a.repeats)
    finally:
        shutil.rmtree(a.work, ignore_errors=True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GiB memory; {nbytes / 1e9:.2f} GB converted"
    origin = origin_of_process(("torch", "safetensors", "mpi4py"), machine)
    report = {
        "benchmark": "convert_7b",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": origin.commit,
        "command": "python benchmarks/convert_7b.py --work DIR" + (f" --repeats {a.repeats}" if a.repeats > 1 else ""),
        "machine": origin.machine,
        "versions": origin.versions,
        "runs": results,
        "rows": rows(results, same),
    }
    a.output.parent.mkdir(exist_ok=True)
    a.output.write_text(json.dumps(report, indent=1) + "\n")
    print(a.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
