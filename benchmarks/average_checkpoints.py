#!/usr/bin/env python
"""Averaging two checkpoints with olmo_hybrid_7b's widths: time against `cp` of the same bytes, and peak memory.

python benchmarks/average_checkpoints.py --work /scratch/average                          # 7B: 45 GB each, 135 GB of disk
python benchmarks/average_checkpoints.py --work /scratch/average --dtype fp32             # 30 GB each, 89 GB of disk
python benchmarks/average_checkpoints.py --work /scratch/average --dtype bf16             # 15 GB each, 45 GB of disk
    --layer-pattern GGGA   its first four layers     --repeats N

The checkpoints hold random weights. `training`: bf16 weights and fp32 masters, as training saves them without moments. `fp32`,
`bf16`: only weights of that type. Averaging reads both and writes one, so that the bound is `cp` of one and a second read. Files
are dropped from the page cache before every measurement, and time counts until `sync` has put the result on disk. Each result is
removed before the next is made.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

from convert_7b import timed
from report import bounded, row, write

ROOT = Path(__file__).resolve().parents[1]
GOAL_GB = 3.0
DRAWN = 1 << 24
"""Random values that are drawn. Tensors repeat them."""


def generate(folder: Path, layer_pattern: str, dtype: str, seed: int) -> None:
    """Write a checkpoint of random weights. Run it in a process of its own: it imports torch."""
    import torch

    from megatron_hybrid.arch.model import ModelConfig
    from megatron_hybrid.arch.tensor_slice import TensorSlice
    from megatron_hybrid.arch.tensors import model_tensors
    from megatron_hybrid.checkpoint import writer
    from megatron_hybrid.checkpoint.format import Index
    from megatron_hybrid.config.presets import preset

    model = ModelConfig(**{**preset("olmo_hybrid_7b").model_dump(), "layer_pattern": layer_pattern})
    drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(seed))

    def tensors():
        for name, spec in model_tensors(model).items():
            count, whole = math.prod(spec.shape), TensorSlice.whole(spec.shape)
            master = drawn.repeat(-(-count // DRAWN))[:count].view(spec.shape)
            if spec.always_fp32 or dtype == "fp32":
                yield writer.SlicedTensor(name, spec.shape, whole, master)
                continue
            yield writer.SlicedTensor(name, spec.shape, whole, master.bfloat16())
            if dtype == "training":
                yield writer.SlicedTensor(f"optimizer.master/{name}", spec.shape, whole, master)

    written = folder.with_name(f".saving-{folder.name}")
    written.mkdir(parents=True)
    writer.write_rank(written, 0, tensors(), {})
    writer.finish(written, folder, Index(model.architecture(), {}, {}), world_size=1)


def generate_both(work: Path, options: list[str]) -> None:
    """Write the two checkpoints at the same time."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *options]
    making = [
        subprocess.Popen([*command, "--generate", str(seed), "--work", str(work / name)], env=environment)
        for seed, name in enumerate("ab")
    ]
    if any([process.wait() for process in making]):
        sys.exit(f"a checkpoint could not be written to {work}")


def measure(work: Path, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Time `cp` and the average in turn."""
    first, second, out = work / "a", work / "b", work / "out"
    tool = [sys.executable, "tools/average_checkpoints.py", str(first), str(second), "--out", str(out), "--quiet"]
    results: dict[str, list[dict[str, float]]] = {"cp": [], "average": []}
    for _ in range(repeats):
        for name, command in (("cp", ["cp", "-r", str(first), str(out)]), ("average", tool)):
            timed(["true"], second)  # drops the second checkpoint from the page cache as well
            results[name].append(timed(command, first))
            shutil.rmtree(out)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made; on the disk to measure")
    parser.add_argument("--layer-pattern", default="GGGA*8")
    parser.add_argument("--dtype", choices=("training", "fp32", "bf16"), default="training")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--generate", type=int, help=argparse.SUPPRESS)
    a, _ = parser.parse_known_args()
    if a.generate is not None:
        generate(a.work, a.layer_pattern, a.dtype, a.generate)
        return
    if a.work.exists():
        sys.exit(f"{a.work} exists; name a folder to make")
    try:
        generate_both(a.work, ["--layer-pattern", a.layer_pattern, "--dtype", a.dtype])
        nbytes = sum(path.stat().st_size for path in (a.work / "a").iterdir())
        results = measure(a.work, a.repeats)
    finally:
        shutil.rmtree(a.work, ignore_errors=True)
    best = {name: min(run["seconds"] for run in runs) for name, runs in results.items()}
    peak = max(run["rss"] for run in results["average"]) / 1e9
    case = f"two checkpoints of {nbytes / 1e9:.2f} GB, {a.dtype}, {a.layer_pattern}"
    rows = [
        row(case, "time", "s", best["average"], best["cp"], "cp of one"),
        bounded(case, "peak resident memory", "GB", peak, GOAL_GB),
    ]
    write("average_checkpoints", rows, ("torch", "safetensors"))


if __name__ == "__main__":
    main()
