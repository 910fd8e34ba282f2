"""A run that trains a step in a few milliseconds, and what its checkpoints hold."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hybrid.checkpoint.folders import complete_checkpoints
from megatron_hybrid.checkpoint.index_file import read_index
from megatron_hybrid.checkpoint.verification import find_damage

LAYOUTS = {"one rank": (1, []), "TP2": (2, ["parallel.tensor_parallel_size=2"]), "DP2": (2, [])}
_MODEL = (
    "model={base_preset: olmo_hybrid_tiny, layer_pattern: GA, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, "
    "gdn: {num_key_heads: 2, num_value_heads: 2, key_head_dim: 8, value_head_dim: 16}}"
)


def arguments(folder: Path, run_dir: Path, layout: str, steps: int, **fields: Any) -> list[str]:
    """Return the arguments of tools/pretrain.py for a tiny run, whose data is in `folder`."""
    tokens = folder / "tokens.npy"
    if not tokens.exists():
        (np.random.default_rng(0).integers(-3, 4, 40_000).cumsum() % 251).astype("<u2").tofile(tokens)
    values = {
        "run_dir": run_dir,
        "data.train": f"[{{path: {tokens}}}]",
        "data.sequence_length": 64,
        "train.steps": steps,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 1,
        "train.dtype": "fp32",
        "logging.plot_interval": 0,
        "logging.tensorboard": "false",
        "preflight.enabled": "false",
    }
    return [
        "olmo_hybrid_tiny",
        _MODEL,
        *LAYOUTS[layout][1],
        *(f"{name}={value}" for name, value in (values | fields).items()),
    ]


def newest(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run."""
    found = complete_checkpoints(run_dir / "checkpoints")
    return found[-1] if found else None


def damage_of(checkpoint: Path) -> dict[str, str]:
    """Return what is damaged in a checkpoint; raise if its index cannot be read."""
    return find_damage(checkpoint, read_index(checkpoint))


def content(checkpoint: Path) -> dict[str, Any]:
    """Return hashes of the tensors' files, the state and the tensors' places: equal for bit-identical runs."""
    index = json.loads((checkpoint / "index.json").read_text())
    files = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in index["files"]}
    return {"files": files, "state": index["state"], "tensors": index["tensors"]}


def remains(run_dir: Path) -> list[str]:
    """Return the names in a run's checkpoints that are no complete checkpoint."""
    root = run_dir / "checkpoints"
    good = {path.name for path in complete_checkpoints(root)}
    return sorted(path.name for path in root.iterdir() if path.name not in good) if root.is_dir() else []
