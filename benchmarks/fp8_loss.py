"""Loss of FP8 training against bf16 from the same start: 300 steps of a small hybrid on real text, the same batches.

The text is the Python standard library's sources, byte by byte. Runs go through tools/pretrain.py.

A run in bf16 whose micro-batches are half as large, which rounds elsewhere, shows how far two equal runs drift apart. It is further
than the goal: what counts is the mean gap over several seeds, each of which has its own weights and order of data.

python benchmarks/fp8_loss.py [--steps 300] [--seeds 3] [--formats bf16,fp8_tensorwise+attention] [--at-once 2]
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]
MODEL = (
    "{base_preset: olmo_hybrid_tiny, layer_pattern: GGGA*2, hidden_size: 1024, ffn_hidden_size: 2816, num_attention_heads: 8, "
    "gdn: {num_key_heads: 8, num_value_heads: 8, key_head_dim: 96, value_head_dim: 192}}"
)
LAST = 50
"""Steps at the end whose mean loss is compared."""
GOAL = 0.005
AGAIN = "bf16 in micro-batches of 4"
FORMATS = ["fp8_tensorwise", "fp8_delayed", "fp8_blockwise", "fp8_tensorwise+attention", "fp8_delayed+attention"]


def prepare(folder: Path) -> Path:
    """Token files of the standard library; the prefix of the training part."""
    stdlib = sysconfig.get_path("stdlib")
    skip = ["site-packages/*", "test/*", "*/test/*", "*/tests/*"]
    command = [sys.executable, "tools/preprocess_data.py", stdlib, "--include", "*.py", "--exclude", *skip]
    subprocess.run([*command, "--output", str(folder / "text"), "--split", "0.99,0.01"], cwd=ROOT, check=True)
    return folder / "text_train"


def train(name: str, seed: int, data: Path, folder: Path, steps: int, sequence: int, gpu: str | None) -> list[float]:
    """Losses of a run in this format."""
    linear, _, attention = ("bf16" if name == AGAIN else name).partition("+")
    run = folder / f"{name.replace('+', '_').replace(' ', '_')}_{seed}"
    overrides = [
        f"run_dir={run}",
        f"model={MODEL}",
        f"data.train=[{{path: {data}}}]",
        "data.validation=[]",
        f"data.sequence_length={sequence}",
        f"data.seed={seed}",
        f"train.seed={seed}",
        f"train.steps={steps}",
        "train.eval_interval=null",
        "tasks.paths=[]",
        "train.global_batch_size=16",
        f"train.micro_batch_size={4 if name == AGAIN else 8}",
        "train.dtype=bf16",
        "train.optimizer.lr=1e-3",
        "train.schedule.warmup_steps=30",
        "checkpoint.interval=null",
        "parallel={}",
        "logging.plot_interval=0",
        "logging.tensorboard=false",
    ]
    if linear != "bf16":
        overrides.append(
            f"precision={{fp8_recipe: {linear.removeprefix('fp8_')}{', fp8_attention: true' if attention else ''}}}"
        )
    environment = os.environ | {"OMP_NUM_THREADS": "2"} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "tools/pretrain.py", "examples/configs/pretrain_hybrid_tiny.yaml", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}, seed {seed}: status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    print(
        *[line for line in done.stdout.splitlines() if "fp8" in line.lower() or "attention" in line],
        sep="\n",
        flush=True,
    )
    with open(run / "metrics.jsonl") as f:
        return [json.loads(line)["loss"] for line in f]


def main() -> None:
    import torch
    from kernel_timing import write_gpu

    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=2, help="runs on a GPU, of whose time much is start-up")
    parser.add_argument("--formats", default=f"bf16,{AGAIN},{','.join(FORMATS)}")
    args, _ = parser.parse_known_args()
    free: Queue = Queue()
    for _ in range(args.at_once):
        for gpu in range(torch.cuda.device_count()):
            free.put(str(gpu))
    if free.empty():
        free.put(None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare(folder)

        def run(job: tuple[str, int]) -> list[float]:
            gpu = free.get()
            try:
                return train(*job, data, folder, args.steps, args.sequence, gpu)
            finally:
                free.put(gpu)

        formats = args.formats.split(",")
        jobs = [(name, seed) for seed in range(args.seeds) for name in formats]
        with ThreadPoolExecutor(free.qsize()) as pool:
            losses = dict(zip(jobs, pool.map(run, jobs), strict=True))
    write_gpu("fp8_loss", rows_of(formats, losses, args))


def rows_of(formats: list[str], losses: dict[tuple[str, int], list[float]], args) -> list[dict]:
    """Return the loss of each format, and its mean difference from bf16 at the same seed."""
    from report import bounded

    last = {job: fmean(values[-LAST:]) for job, values in losses.items()}
    rows = []
    for name in formats:
        case = f"{name}, {args.steps} steps of 32,768 bytes, {args.seeds} seeds"
        mean = fmean(last[name, seed] for seed in range(args.seeds))
        rows.append(bounded(case, f"mean loss of the last {LAST} steps", "nats a byte", mean, None))
        if name == "bf16":
            first = fmean(losses[name, seed][0] for seed in range(args.seeds))
            rows.append(bounded(case, "loss of the first step", "nats a byte", first, None))
            continue
        gaps = [last[name, seed] / last["bf16", seed] - 1 for seed in range(args.seeds)]
        rows.append(bounded(case, "mean gap to bf16", "of its loss", abs(fmean(gaps)), None if name == AGAIN else GOAL))
        if args.seeds > 1:
            rows.append(bounded(case, "its standard error", "of bf16's loss", stdev(gaps) / len(gaps) ** 0.5, None))
    return rows


if __name__ == "__main__":
    main()
