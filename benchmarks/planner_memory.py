"""Measure memory and step time of the trainer's engine over many layouts, to validate the planner.

The layouts have OLMo Hybrid 7B's widths. Cases of one GPU run on every GPU at once, then those of two GPUs in one torchrun. Each
process builds, measures and closes one engine after another.

python benchmarks/planner_memory.py [--seconds 210] [--ranks 2] [--out FOLDER]      writes FOLDER/planner-<gpu>.json
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
STEPS, WARMUP = 3, 2
SLICE, WHOLE = "GGGA*2", "GGGA*8"


@dataclass(frozen=True)
class Case:
    """One layout. `held_out`: no factor is fitted to it. `microbatches`: per rank and step."""

    name: str
    world: int = 1
    pattern: str = SLICE
    sequence: int = 8192
    micro_batch: int = 1
    microbatches: int = 2
    held_out: bool = False
    gigabytes: int = 80
    """Memory of the smallest device that it fits."""
    parallel: dict = field(default_factory=dict)
    precision: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)

    def config(self) -> dict:
        """Return the configuration of the run."""
        degrees = (self.parallel.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline", "context"))
        replicas = self.world // math.prod(degrees)
        return {
            "run_dir": "runs/none",
            "model": {"base_preset": "olmo_hybrid_7b", "layer_pattern": self.pattern} | self.model,
            "data": {"train": [{"path": "none"}], "sequence_length": self.sequence} | self.data,
            "train": {
                "steps": 1,
                "micro_batch_size": self.micro_batch,
                "global_batch_size": self.micro_batch * self.microbatches * replicas,
            },
            "parallel": self.parallel,
            "precision": self.precision,
        }

    def record(self, found: dict) -> dict:
        """Return the case with its measurements, as planner_errors.py reads it."""
        case = {"case": self.name, "world": self.world, "held_out": self.held_out, "config": self.config()}
        return case | found


def _split(tp=1, pp=1, vpp=1, **more) -> dict:
    return dict(tensor_parallel_size=tp, pipeline_parallel_size=pp, virtual_pipeline_parallel_size=vpp, **more)


OVERLAP = dict(overlap_grad_reduce=True, overlap_param_gather=True)
FP8, DELAYED = dict(fp8_recipe="tensorwise"), dict(fp8_recipe="delayed", fp8_attention=True)
BLOCKWISE = dict(fp8_recipe="blockwise", cache_fp8_weights=False)
CASES = [
    Case("8 layers"),
    Case("8 layers, micro-batch 2, selective", micro_batch=2, held_out=True, parallel=_split(recompute_granularity="selective")),
    Case("8 layers, micro-batch 2, full", micro_batch=2, parallel=_split(recompute_granularity="full")),
    Case("4 layers, sequence 16384", pattern="GGGA", sequence=16384, held_out=True),
    Case("8 layers, sequence 2048, micro-batch 4", sequence=2048, micro_batch=4),
    Case("4 layers, sequence 32768, selective", pattern="GGGA", sequence=32768, microbatches=1, held_out=True,
         parallel=_split(recompute_granularity="selective")),
    Case("4 layers of Gated DeltaNet", pattern="G*4", held_out=True),
    Case("4 layers of attention", pattern="A*4"),
    Case("8 layers, sequence 256: launches alone", sequence=256),
    Case("8 layers, FP8", precision=FP8),
    Case("8 layers, micro-batch 2, FP8 delayed, attention too, selective", micro_batch=2, held_out=True,
         parallel=_split(recompute_granularity="selective"), precision=DELAYED),
    Case("8 layers, FP8 blockwise, weights not kept", precision=BLOCKWISE, held_out=True),
    Case("TP2", 2, parallel=_split(2)),
    Case("TP2, 12 layers, micro-batch 2, selective", 2, "GGGA*3", micro_batch=2, held_out=True,
         parallel=_split(2, recompute_granularity="selective")),
    Case("TP2, no sequence parallelism", 2, parallel=_split(2, sequence_parallel=False)),
    Case("TP2, sequence 32768", 2, "GGGA", 32768, microbatches=1, held_out=True, parallel=_split(2)),
    Case("TP2, FP8", 2, held_out=True, parallel=_split(2), precision=FP8),
    Case("PP2, 16 layers", 2, "GGGA*4", microbatches=4, gigabytes=141, parallel=_split(1, 2)),
    Case("PP2, VPP2, 16 layers", 2, "GGGA*4", microbatches=4, held_out=True, gigabytes=141, parallel=_split(1, 2, 2)),
    Case("PP2, uneven, full", 2, "GGGA*4", microbatches=4, held_out=True, gigabytes=141,
         parallel=_split(1, 2, pipeline_split=[9, 7], recompute_granularity="full")),
    Case("DP2, overlapped", 2, parallel=_split(**OVERLAP)),
    Case("DP2, 12 layers, sequence 4096, micro-batch 2, plain optimizer, full", 2, "GGGA*3", 4096, 2, held_out=True,
         gigabytes=141, parallel=_split(distributed_optimizer=False, recompute_granularity="full")),
    # the same job under every layout that fits two H200s, for the planner's ranking
    Case("7B, TP2", 2, WHOLE, microbatches=4, gigabytes=141, parallel=_split(2)),
    Case("7B, TP2, selective, micro-batch 2", 2, WHOLE, micro_batch=2, held_out=True, gigabytes=141,
         parallel=_split(2, recompute_granularity="selective")),
    Case("7B, TP2, full, micro-batch 4", 2, WHOLE, micro_batch=4, microbatches=1, held_out=True, gigabytes=141,
         parallel=_split(2, recompute_granularity="full")),
    Case("7B, PP2", 2, WHOLE, microbatches=4, gigabytes=141, held_out=True, parallel=_split(1, 2)),
    Case("7B, PP2, VPP4, selective", 2, WHOLE, microbatches=4, gigabytes=141,
         parallel=_split(1, 2, 4, recompute_granularity="selective")),
    Case("7B, DP2, overlapped, full", 2, WHOLE, gigabytes=141, held_out=True,
         parallel=_split(recompute_granularity="full", **OVERLAP)),
]  # fmt: skip


def run_cases(cases: list[Case], out: Path, deadline: float) -> None:
    """Run cases one after another in this process, and write `out` after each."""
    import torch

    from megatron_hybrid.config.run import RunConfig
    from megatron_hybrid.distributed.process_groups import stop_distributed
    from megatron_hybrid.launch.environment import Launch
    from megatron_hybrid.launch.start import start_distributed
    from megatron_hybrid.profiling.engine_steps import gather, measure

    launch, found = Launch.from_environment(), []
    for case in cases:
        if _is_late(deadline, launch):
            print(f"no time left for: {case.name}", flush=True)
            continue
        config = RunConfig.model_validate(_expanded(case))
        groups = start_distributed(launch, config.parallel, config.train.seed, quiet=True)
        result: dict = {}
        started, left = time.perf_counter(), torch.cuda.memory_allocated() / 1e9
        if left > 1:
            print(f"{left:.1f} GB are still allocated before: {case.name}", flush=True)
        try:
            result = gather(
                measure(config, groups, STEPS, WARMUP, layers=case.parallel.get("pipeline_parallel_size", 1) == 1)
            )
        except torch.cuda.OutOfMemoryError as error:
            if launch.world_size > 1:
                raise  # the others wait for this rank
            where = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-12:]]
            result = {"out_of_memory": True, "error": str(error)[:600], "where": where}
        except (RuntimeError, ValueError) as error:
            if launch.world_size > 1:
                raise
            result = {"error": str(error)[:300]}
        _forget(config)
        if launch.rank == 0:
            found.append(case.record(result))
            out.write_text(json.dumps(found))
            shown = {k: v for k, v in result.items() if k not in ("saved_by_layer",)}
            print(f"{case.name}: {shown}, {time.perf_counter() - started:.0f} s in all", flush=True)
    stop_distributed()


def _expanded(case: Case) -> dict:
    from megatron_hybrid.config.presets import expand

    config = case.config()
    return {**config, "model": expand(config["model"])}


def _is_late(deadline: float, launch) -> bool:
    """Return True if the deadline has passed by rank 0's clock."""
    import torch
    import torch.distributed as dist

    late = torch.tensor([float(time.time() > deadline)])
    if launch.world_size > 1 and dist.is_initialized():
        late = late.cuda()
        dist.broadcast(late, 0)
    return bool(late.item())


def _forget(config) -> None:
    """Destroy the layout's process groups, but not the default one."""
    from kernel_timing import forget

    from megatron_hybrid.distributed.process_groups import leave_groups

    leave_groups()
    if config.precision.fp8:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
    forget()


def lead(arguments) -> None:
    """Start the processes and merge their results."""
    import torch

    gpus = torch.cuda.device_count()
    name = torch.cuda.get_device_name()
    out, deadline = arguments.out, time.time() + arguments.seconds
    out.mkdir(parents=True, exist_ok=True)
    common = ["--deadline", str(deadline), "--out", str(out), "--only", arguments.only]
    here = [str(Path(__file__).resolve()), *common]
    ones = [
        subprocess.Popen(
            [sys.executable, *here, "--part", f"{i}/{gpus}"], env=os.environ | {"CUDA_VISIBLE_DEVICES": str(i)}
        )
        for i in range(gpus)
        if 1 in arguments.ranks
    ]
    for process in ones:
        process.wait()
    parts = [out / f"part-{i}of{gpus}.json" for i in range(gpus)]
    if gpus > 1 and 2 in arguments.ranks:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29512"]
        subprocess.run([*torchrun, *here, "--part", "two"])
        parts.append(out / "part-two.json")
    cases = [case for part in parts if part.exists() for case in json.loads(part.read_text())]
    cases = [again(case, here, out) if case.get("out_of_memory") else case for case in cases]
    short = next((x for x in ("H100", "H200", "B200") if x in name), name.replace(" ", "-"))
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    result = {"device": name, "date": time.strftime("%Y-%m-%d"), "commit": arguments.commit, "versions": versions}
    result["total_memory"] = torch.cuda.get_device_properties(0).total_memory
    (out / f"planner-{short}.json").write_text(json.dumps(result | {"cases": cases}, indent=1))
    print(f"{len(cases)} cases in {out}/planner-{short}.json")


def again(case: dict, here: list[str], out: Path) -> dict:
    """Repeat a case of one GPU that ran out of memory in a process of its own, as a run has it.

    Communicators and workspaces of earlier cases stay outside of PyTorch's memory.
    """
    path = out / "part-alone.json"
    path.unlink(missing_ok=True)
    subprocess.run([sys.executable, *here, "--only", f"^{re.escape(case['case'])}$", "--part", "alone"])
    return json.loads(path.read_text())[0] if path.exists() else case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "measured")
    parser.add_argument("--seconds", type=float, default=210, help="no case starts later than this")
    parser.add_argument("--only", default="", help="cases whose name this regular expression finds")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="cases of these numbers of GPUs")
    parser.add_argument("--commit", help="where git is not at hand")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is None:
        lead(arguments)
        return
    import torch

    capacity = 1 + torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 1e9
    if arguments.part == "two":
        mine, name = [case for case in CASES if case.world == 2], "part-two.json"
        mine.sort(key=lambda case: case.pattern != WHOLE)  # the ranking, whatever time is left
    else:
        index, count = map(int, arguments.part.split("/")) if arguments.part != "alone" else (0, 1)
        mine = [case for case in CASES if case.world == 1][index::count]
        name = f"part-{index}of{count}.json" if arguments.part != "alone" else "part-alone.json"
    mine = [case for case in mine if case.gigabytes <= capacity + 5 and re.search(arguments.only, case.name)]
    run_cases(mine, arguments.out / name, arguments.deadline)


if __name__ == "__main__":
    main()
