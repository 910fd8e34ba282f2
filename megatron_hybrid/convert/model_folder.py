"""A trained model in a folder: a run (its newest checkpoint), a checkpoint, or a Hugging Face folder.

`open_model` is the one place that decides which of them a path is. Every tool that takes a model calls it.
"""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.checkpoint.folders import find_checkpoint
from megatron_hybrid.checkpoint.format import INDEX, CheckpointError
from megatron_hybrid.checkpoint.open_files import OpenFiles
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.convert.architecture import is_run_or_checkpoint
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf.original_files import kept_files, tokenizer_files
from megatron_hybrid.convert.hf.reader import CONFIG, HuggingFaceFolder, open_huggingface
from megatron_hybrid.convert.io.source import TORCH_NAMES, as_matrix

if TYPE_CHECKING:
    import torch


class ModelFolder(Protocol):
    """An open model. Use it in a `with`, or close it."""

    @property
    def run(self) -> dict[str, Any]:
        """Configuration of the run that trained it, as far as it is known."""
        ...

    @property
    def step(self) -> int | None:
        """Step after which it was saved; None: unknown."""
        ...

    @property
    def tokenizer(self) -> str | None:
        """Tokenizer that belongs to it; None: the folder does not name one."""
        ...

    @property
    def model(self) -> ModelConfig:
        """Configuration of the model."""
        ...

    def read(self, name: str, wanted: TensorSlice | None = None) -> "torch.Tensor":
        """Return a slice of a weight on the CPU; None: all of it."""
        ...

    def close(self) -> None:
        """Close its files."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def open_model(path: str | Path, eos_token_id: int | None = None) -> ModelFolder:
    """Open the model in a folder.

    Args:
        eos_token_id: the end-of-document token of a Hugging Face folder that lists several.

    Raises:
        CheckpointError: the folder is none of the three, or its checkpoint is damaged.
        ConversionError: a Hugging Face folder that cannot be read.
    """
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run, a checkpoint or a Hugging Face folder")
    if is_run_or_checkpoint(folder):
        return CheckpointFolder(find_checkpoint(str(folder), "checkpoint"))
    if (folder / CONFIG).is_file():
        return HuggingFaceModel(open_huggingface(folder, eos_token_id))
    raise CheckpointError(
        f"{path}: no model is there; give a run with complete checkpoints, a checkpoint (a folder with {INDEX}) or a Hugging "
        f"Face folder (with {CONFIG})"
    )


class CheckpointFolder(CheckpointReader):
    """A checkpoint as a ModelFolder."""

    def __enter__(self) -> Self:
        return self

    @property
    def run(self) -> dict[str, Any]:
        """Configuration of its run."""
        return self.index.run

    @property
    def step(self) -> int | None:
        """Step after which it was saved."""
        step = self.index.state.get("step")
        return step if isinstance(step, int) else None

    @cached_property
    def tokenizer(self) -> str | None:
        """Tokenizer of its run, or the folder of the one that it keeps from the model it was converted from."""
        data = self.run.get("data")
        name = data.get("tokenizer") if isinstance(data, dict) else None
        if isinstance(name, str) and name:
            return name
        kept = [path for path in kept_files(self.folder).values() if path.name == "tokenizer.json"]
        return str(kept[0].parent) if kept else None


class HuggingFaceModel:
    """A Hugging Face folder as a ModelFolder."""

    def __init__(self, opened: HuggingFaceFolder) -> None:
        self.folder, self.model = opened.folder, opened.model
        self.notes = opened.notes
        self.run: dict[str, Any] = {}
        self.step: int | None = None
        self.tokenizer = str(opened.folder) if "tokenizer.json" in tokenizer_files(opened.folder) else None
        self._sources, self._files = opened.sources, OpenFiles(ConversionError)

    def read(self, name: str, wanted: TensorSlice | None = None) -> "torch.Tensor":
        """Return a slice of a weight on the CPU; None: all of it."""
        import torch

        source = self._sources[name]
        part = as_matrix(wanted or TensorSlice.whole(source.shape))
        block = source.read_rows(self._files, part.offset[0], part.end[0])
        rows = torch.frombuffer(block, dtype=getattr(torch, TORCH_NAMES[source.dtype])).view(part.shape[0], -1)
        values = rows[:, part.offset[1] : part.end[1]].clone()
        return values.view(wanted.shape if wanted else source.shape)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
