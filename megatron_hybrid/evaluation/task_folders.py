"""Writes tasks: JSON Lines documents and a YAML file in lm-eval's format per task."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_hybrid.base.errors import UserError


def new_folder(folder: Path) -> Path:
    """Create an empty folder.

    Raises:
        UserError: it exists and has files.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_task(folder: Path, config: dict[str, Any], documents: Sequence[dict[str, Any]]) -> None:
    """Write NAME.yaml and NAME.jsonl into a folder, where `config` has the name as its `task`."""
    name = config["task"]
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**config, **data}, sort_keys=False), encoding="utf-8")
