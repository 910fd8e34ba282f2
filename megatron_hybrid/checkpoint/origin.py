"""Origin of a checkpoint's weights: the model that was converted, and earlier runs.

The index names both, in `run.converted_from` and `run.trained_before`. The folder `original/` holds the files that were
next to a converted model's weights, such as its tokenizer. Training copies all of it into its checkpoints, so that an
export contains these files again.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hybrid.base.synced_files import sync, write_synced

FOLDER = "original"


@dataclass(frozen=True)
class Origin:
    """Entries for the index's `run`, and the content of `original/` by relative path."""

    record: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, run: dict[str, Any], with_files: bool = True) -> "Origin":
        """Return the origin for a run that starts from checkpoint `folder`, whose index has this `run`."""
        record = {name: run[name] for name in ("converted_from",) if name in run}
        if longest := longest_sequence(run):
            record["trained_before"] = {"checkpoint": str(folder), "sequence_length": longest}
        kept = folder / FOLDER
        paths = [p for p in sorted(kept.rglob("*")) if p.is_file() and not p.is_symlink()] if with_files else []
        return cls(record, {str(path.relative_to(kept)): path.read_bytes() for path in paths})

    def write(self, checkpoint: Path) -> dict[str, dict[str, Any]]:
        """Write `original/` into a checkpoint's folder, if there are files to keep.

        Returns:
            The entries of these files in the index.
        """
        entries = {}
        for name, content in self.files.items():
            path = checkpoint / FOLDER / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_synced(path, content)
            sync(path.parent)
            entries[f"{FOLDER}/{name}"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        return entries


def longest_sequence(run: dict[str, Any]) -> int | None:
    """Return the longest sequence length in the training of a checkpoint's weights, according to its index's `run`."""
    sections = (run.get("data"), run.get("trained_before"))
    lengths = [section.get("sequence_length") for section in sections if isinstance(section, dict)]
    return max((n for n in lengths if type(n) is int and n > 0), default=None)
