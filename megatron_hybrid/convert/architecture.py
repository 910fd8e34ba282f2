"""The architecture of a trained model, for `model: {from: PATH}` in a run's configuration. Imports no torch."""

from pathlib import Path
from typing import Any

from megatron_hybrid.base.errors import ConfigError, UserError
from megatron_hybrid.checkpoint.folders import complete_checkpoints, find_checkpoint
from megatron_hybrid.checkpoint.format import INDEX
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.convert.hf.config import read_config
from megatron_hybrid.convert.hf.reader import CONFIG
from megatron_hybrid.convert.io.folder import read_json, regular_file


def is_run_or_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint, or holds complete ones."""
    return (folder / INDEX).is_file() or any(complete_checkpoints(f) for f in (folder, folder / "checkpoints"))


def architecture_of(path: str) -> dict[str, Any]:
    """Return the fields of the model in a run, a checkpoint or a Hugging Face folder, which needs no weights.

    Raises:
        ConfigError: there is no model, or it cannot be read.
    """
    folder = Path(path)
    try:
        if is_run_or_checkpoint(folder):
            with CheckpointReader(find_checkpoint(path, "model.from")) as reader:
                return reader.model.model_dump(mode="json")
        if (folder / CONFIG).is_file():
            return read_config(read_json(regular_file(folder, CONFIG), limit=1 << 20)).model.model_dump(mode="json")
    except (UserError, OSError) as error:
        raise ConfigError.at("model.from", f"{path} cannot be read: {error}") from None
    raise ConfigError.at(
        "model.from", f"{path}: no model is there; give a run, a checkpoint, or a Hugging Face folder with its {CONFIG}"
    )
