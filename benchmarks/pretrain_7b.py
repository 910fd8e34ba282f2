"""OLMo Hybrid 7B from scratch on this node's GPUs, through tools/launch.py, on real text: what a run's metrics say of it.

The text is the Python standard library's sources, byte by byte, in batches of 16 sequences of 8192; weights are whole on each GPU,
linears in FP8. It ends with a checkpoint of 104 GB, which goes with its folder.

python benchmarks/pretrain_7b.py [--steps 34] [--gpus 4]
    --metrics FILE    of a run that is there already
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]
FIRST = 10
"""Steps before which throughput is not counted: kernels are compiled in the first."""


def train(steps: int, gpus: int, folder: Path) -> Path:
    """The run's metrics.jsonl."""
    from fp8_loss import prepare

    overrides = [
        f"run_dir={folder / 'run'}",
        f"data.train=[{{path: {prepare(folder)}}}]",
        "data.validation=[]",
        "data.tokenizer=byte",
        f"train.steps={steps}",
        "train.eval_interval=null",
        "train.global_batch_size=16",
        "train.micro_batch_size=1",
        "train.schedule.warmup_steps=8",
        "checkpoint={interval: null}",
        "parallel={overlap_grad_reduce: true, overlap_param_gather: true}",
        "precision.fp8_recipe=tensorwise",
        "logging.plot_interval=0",
        "logging.tensorboard=false",
    ]
    command = [sys.executable, "tools/launch.py", "--gpus", str(gpus), "tools/pretrain.py"]
    subprocess.run([*command, "examples/configs/pretrain_hybrid_7b.yaml", *overrides], cwd=ROOT, check=True)
    return folder / "run" / "metrics.jsonl"


def rows_of(steps: list[dict], gpus: int) -> list[dict]:
    from report import bounded, row

    case = f"7B, TP1 x DP{gpus}, FP8 tensorwise, 16 sequences a step"
    late = steps[FIRST:]
    tokens = median(step["tokens_per_s"] for step in late) / gpus
    last = sum(step["loss"] for step in steps[-5:]) / 5
    return [
        row(case, f"throughput, median from step {FIRST + 1} on", "tokens/s/GPU", tokens, higher_is_better=True),
        row(case, "MFU", "of 989 TFLOP/s", median(step["mfu"] for step in late), higher_is_better=True),
        row(case, "first step, compiling and tuning included", "s", steps[0]["seconds"]),
        row(case, "peak memory", "GB", max(step["memory_gb"] for step in steps)),
        bounded(case, "loss of the first step", "nats a byte", steps[0]["loss"], None),
        bounded(case, f"mean loss of steps {len(steps) - 4} to {len(steps)}", "nats a byte", last, 4.0),
    ]


def main() -> None:
    from kernel_timing import write_gpu

    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=34)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--metrics", type=Path)
    args, _ = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.metrics or train(args.steps, args.gpus, Path(folder))
        with open(path) as f:
            steps = [json.loads(line) for line in f]
    write_gpu("pretrain_7b", rows_of(steps, args.gpus))


if __name__ == "__main__":
    main()
