"""DroPE against YaRN in miniature: one hybrid trained at 1,024 bytes and extended to 8,192 in both ways.

python benchmarks/drope_yarn.py                 on one GPU: about 5 minutes
python benchmarks/drope_yarn.py --smoke         on a CPU: checks that everything runs, and writes no result file
    --folder FOLDER     of data, runs and measurements (default: runs/drope_yarn)

To resume after an interruption, run the same command again. The stages are those of benchmarks/drope_yarn_stages. Each model
recalls a number that is stored once in a text (exact match of all digits), and its loss on plain text is measured by position.
The result file is written again after each model.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
NAMES = {"pretrain": "no extension", "drope": "DroPE", "yarn": "YaRN"}
"""Names of the models by their stages."""


@dataclass(frozen=True)
class Size:
    """Sizes of data, runs and measurements."""

    short: int
    long: int
    documents: dict[str, int]
    overrides: dict[str, tuple[str, ...]]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    tests: int
    texts: int
    bucket: int


WHOLE = Size(
    short=1024, long=8192, documents={"short": 48_000, "long": 2400}, overrides={"pretrain": (), "extend": ()},
    lengths=(1024, 2048, 4096, 8192, 16384), depths=tuple(n / 20 for n in range(1, 20, 2)), tests=24, texts=64, bucket=512,
)  # fmt: skip
_TINY = ("model.hidden_size=64", "model.ffn_hidden_size=128", "model.num_attention_heads=2", "train.dtype=fp32",
         "model.gdn={num_key_heads: 2, num_value_heads: 2, key_head_dim: 24, value_head_dim: 48}",
         "train.micro_batch_size=2", "train.global_batch_size=2", "train.steps=4", "checkpoint.interval=2")  # fmt: skip
SMOKE = Size(
    short=128, long=256, documents={"short": 16, "long": 16},
    overrides={"pretrain": (*_TINY, "data.sequence_length=128", "train.schedule.warmup_steps=1"),
               "extend": (*_TINY, "data.sequence_length=256", "train.schedule.warmup_steps=1")},
    lengths=(256, 512), depths=(0.25, 0.75), tests=1, texts=1, bucket=128,
)  # fmt: skip


def write_data(folder: Path, size: Size) -> bytes:
    """Write the training data of both lengths, and return the held-out text."""
    from testing.recall_documents import library_text, write_documents

    train, held_out = library_text()
    for seed, (name, length) in enumerate((("short", size.short), ("long", size.long))):
        write_documents(folder / "data" / name, train, length, size.documents[name], seed)
    return held_out


def write_stages(folder: Path, size: Size) -> Path:
    """Write the file of stages and return its path."""
    configs, stages = ROOT / "benchmarks/drope_yarn_stages", []
    for name in NAMES:
        kind, data = ("pretrain", "short") if name == "pretrain" else ("extend", "long")
        overrides = [f"data.train=[{{path: {folder / 'data' / data}}}]", *size.overrides[kind]]
        start = {} if name == "pretrain" else {"from": "pretrain", "take": "moments"}
        stages.append({"name": name, "config": str(configs / f"{name}.yaml"), "overrides": overrides, **start})
    path = folder / "stages.yaml"
    path.write_text(json.dumps({"folder": str(folder), "stages": stages}, indent=1))  # JSON is YAML
    return path


def run_stages(path: Path) -> None:
    """Run the stages that are not done, on the first GPU if there is one."""
    ranks = ["--gpus", "1"] if torch.cuda.is_available() else ["--cpu-ranks", "1"]
    command = [sys.executable, str(ROOT / "tools/run_stages.py"), str(path), *ranks]
    subprocess.run(command, check=True, cwd=ROOT)


@torch.no_grad()
def retrieved(model, size: Size, text: bytes) -> dict[str, dict[str, float]]:
    """Return the share of tests whose number the model recalls, by length and depth.

    Every digit must be the model's first choice after the true digits before it, as in greedy decoding.
    """
    from testing.recall_documents import DIGITS, test_document

    found: dict[str, dict[str, float]] = {}
    for length in size.lengths:
        for depth in size.depths:
            draws = [random.Random(f"{length} {depth} {number}") for number in range(size.tests)]
            tokens = as_tokens([test_document(draw, text, length, depth) for draw in draws])
            right = []
            for batch in tokens.split(max(1, 65536 // length)):
                logits = model.network(batch)[:, -DIGITS - 2 : -2, : model.config.vocab_size]
                right += (logits.argmax(-1) == batch[:, -DIGITS - 1 : -1]).all(-1).tolist()
            found.setdefault(str(length), {})[str(depth)] = sum(right) / len(right)
    return found


@torch.no_grad()
def loss_by_position(model, size: Size, text: bytes) -> dict[str, float]:
    """Return the mean loss in nats per byte of each bucket of positions, by its first position, on plain held-out text."""
    longest = max(size.lengths)
    count = min(size.texts, (len(text) - 1) // longest)
    total = torch.zeros(longest, dtype=torch.float64)
    for n in range(count):
        tokens = as_tokens([text[n * longest : (n + 1) * longest + 1]])
        losses = model.network(tokens[:, :-1], tokens[:, 1:], torch.ones_like(tokens[:, 1:], dtype=torch.float32))
        total += losses.per_token[:, 0].double().cpu()
    means = (total / count).view(-1, size.bucket).mean(1).tolist()
    return {str(n * size.bucket): loss for n, loss in enumerate(means)}


def as_tokens(texts: list[bytes]) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.tensor([list(text) for text in texts], device=device)


def measured(folder: Path, stage: str, size: Size, text: bytes) -> dict:
    """Return the measurements of a stage's last checkpoint. They are read if they have been made before."""
    from megatron_hybrid.distributed.process_groups import leave_groups
    from megatron_hybrid.inference.load import load_model

    path = folder / f"{stage}.json"
    if path.exists():
        return json.loads(path.read_text())
    start = time.perf_counter()
    model = load_model(str(folder / stage), "bf16" if torch.cuda.is_available() else "fp32")
    found = {"retrieved": retrieved(model, size, text), "loss": loss_by_position(model, size, text)}
    leave_groups()
    path.with_suffix(".partial").write_text(json.dumps(found))
    os.replace(path.with_suffix(".partial"), path)
    print(f"{stage}: measured in {time.perf_counter() - start:.0f} s", flush=True)
    return found


def rows_of(results: dict[str, dict]) -> list[dict]:
    """Return the rows of the result file.

    The goal of an extension is to miss no more numbers than the model without one, beyond the length of its pretraining.
    """
    from report import bounded, row

    rows, base = [], results["pretrain"]
    for stage, found in results.items():
        name = NAMES[stage]
        for length in found["retrieved"]:
            missed, before = (1 - mean(x["retrieved"][length].values()) for x in (found, base))
            goal = None if stage == "pretrain" or int(length) <= WHOLE.short else before
            rows.append(bounded(f"{name}, {length} bytes", "numbers not recalled", "share", missed, goal))
        for length, by_depth in found["retrieved"].items():
            for depth, share in by_depth.items():
                rows.append(row(f"{name}, {length} bytes, depth {depth}", "numbers recalled", "share", share))
        for position, loss in found["loss"].items():
            peer = {} if stage == "pretrain" else {"peer": base["loss"][position], "peer_name": NAMES["pretrain"]}
            rows.append(row(f"{name}, from byte {position}", "loss", "nats per byte", loss, **peer))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--folder", type=Path)
    args, _ = parser.parse_known_args()
    from report import write

    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    size = SMOKE if args.smoke else WHOLE
    folder = (args.folder or ROOT / "runs" / ("drope_yarn_smoke" if args.smoke else "drope_yarn")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    text = write_data(folder, size)
    run_stages(write_stages(folder, size))
    results: dict[str, dict] = {}
    for stage in NAMES:
        results[stage] = measured(folder, stage, size, text)
        rows = rows_of(results)
        if not args.smoke:
            machine = torch.cuda.get_device_name() if torch.cuda.is_available() else None
            write("drope_yarn", rows, ("torch", "triton", "megatron-core"), machine)
    print(f"{len(rows)} rows")


if __name__ == "__main__":
    main()
