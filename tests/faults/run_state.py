"""Tiny runs of the campaign of run faults, and what is on disk after them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, []),
    "TP2": (2, ["parallel.tensor_parallel_size=2"]),
    "PP2": (2, ["parallel.pipeline_parallel_size=2"]),
    "DP2": (2, []),
    "TP2 x DP2": (4, ["parallel.tensor_parallel_size=2"]),
    "PP2 x DP2": (4, ["parallel.pipeline_parallel_size=2"]),
}
_MODEL = (
    "model={base_preset: olmo_hybrid_tiny, layer_pattern: GA, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, "
    "gdn: {num_key_heads: 2, num_value_heads: 2, key_head_dim: 8, value_head_dim: 16}}"
)
_CURVE = ("step", "loss", "z_loss", "grad_norm", "lr", "eval_loss", "skipped")


def arguments(folder: Path, run_dir: Path, layout: str, steps: int, interval: int, **fields: Any) -> list[str]:
    """Return the arguments of tools/pretrain.py for a tiny run, whose data is in `folder`."""
    for number, name in enumerate(("tokens", "validation")):
        file = folder / f"{name}.npy"
        if not file.exists():
            (np.random.default_rng(number).integers(-3, 4, 20_000).cumsum() % 251).astype("<u2").tofile(file)
    values = {
        "run_dir": run_dir,
        "data.train": f"[{{path: {folder / 'tokens.npy'}}}]",
        "data.validation": f"[{{path: {folder / 'validation.npy'}}}]",
        "data.sequence_length": 64,
        "train.steps": steps,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 1,
        "train.dtype": "fp32",
        "train.eval_batches": 1,
        "train.eval_interval": 4,
        "checkpoint.interval": interval,
        "logging.plot_interval": 0,
        "logging.tensorboard": "false",
        "preflight.enabled": "false",
    }
    overrides = [f"{name}={value}" for name, value in (values | fields).items()]
    return ["olmo_hybrid_tiny", _MODEL, *LAYOUTS[layout][1], *overrides]


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted(p for p in (run_dir / "checkpoints").glob("step-*") if (p / "index.json").is_file())


def saved_step(run_dir: Path) -> int:
    """Return the step of the newest checkpoint; 0 if there is none."""
    found = checkpoints(run_dir)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def logged_step(run_dir: Path) -> int:
    """Return the last step in metrics.jsonl; 0 if there is none."""
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except OSError:
        return 0
    return next((json.loads(line)["step"] for line in reversed(lines) if line.endswith(b"\n")), 0)


def outcome(run_dir: Path) -> dict[str, Any]:
    """Return the curve and the content of the newest checkpoint: equal for runs that are bit-identical."""
    newest = checkpoints(run_dir)[-1]
    index = json.loads((newest / "index.json").read_text())
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in newest.glob("*.safetensors")}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    curve = [[line.get(key) for key in _CURVE] for line in lines]
    return {"step": newest.name, "files": files, "state": index["state"], "curve": curve}
