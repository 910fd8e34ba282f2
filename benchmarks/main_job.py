"""The README's first command on an empty checkout: from `git clone` to a finished run, set-up included.

python benchmarks/main_job.py            also copies the run's loss.png to docs/
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]


def main() -> None:
    from report import bounded, write

    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        start = time.monotonic()
        subprocess.run(["bash", "examples/pretrain_hybrid_tiny.sh"], cwd=clone, check=True)
        minutes = (time.monotonic() - start) / 60
        run = clone / "runs" / "tiny"
        with open(run / "metrics.jsonl") as f:
            lines = [json.loads(line) for line in f]
        shutil.copy(run / "loss.png", ROOT / "docs" / "loss.png")
        training = sum(line["seconds"] for line in lines) / 60
        case = "examples/pretrain_hybrid_tiny.sh, TP2 x PP2 on 4 ranks"
        rates = sorted(line["tokens_per_s"] for line in lines)
        rows = [
            bounded(case, "empty checkout to finished run", "minutes", minutes, 10),
            bounded(case, "of that, training steps", "minutes", training, None),
            bounded(case, "throughput, median of the steps", "tokens/s", rates[len(rates) // 2], None),
            bounded(case, "loss of the first step", "nats a byte", lines[0]["loss"], None),
            bounded(
                case, "mean loss of the last ten steps", "nats a byte", sum(x["loss"] for x in lines[-10:]) / 10, 2.4
            ),
            bounded(case, "validation loss at the end", "nats a byte", lines[-1]["eval/code/loss"], None),
            bounded(case, "validation loss of documentation at the end", "nats a byte", lines[-1]["eval/docs/loss"], None),
            bounded(case, "accuracy of the task http_status at the end", "share", lines[-1]["eval/http_status/acc"], None),
        ]
    write("main_job", rows, ("torch", "megatron-core"))


if __name__ == "__main__":
    main()
