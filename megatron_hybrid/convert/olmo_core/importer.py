"""Import of OLMo-core's native checkpoints: weights, and the optimizer's moments if they are there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import TensorSpec, model_tensors
from megatron_hybrid.checkpoint.format import state_name
from megatron_hybrid.checkpoint.open_files import OpenFiles
from megatron_hybrid.convert.checkpoint_output import CONVERTED_STATE, MAX_FILE_BYTES, stored_dtype, write_index
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.io.folder import has_file, read_json, regular_file
from megatron_hybrid.convert.io.source import TORCH_NAMES
from megatron_hybrid.convert.io.writer import OutputTensor
from megatron_hybrid.convert.job import Conversion, Facts, split_into_files
from megatron_hybrid.convert.olmo_core.config import model_from_olmo_core
from megatron_hybrid.convert.olmo_core.names import HEAD, is_convolution, olmo_core_names
from megatron_hybrid.convert.olmo_core.torch_checkpoint import METADATA, TorchCheckpoint

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE, _IGNORED = "optim.", "optim.param_groups."


def from_olmo_core(
    folder: Path,
    target: Path,
    dtype: str | None = None,
    optimizer: bool = True,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    config: Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Conversion:
    """Plan the conversion of an OLMo-core checkpoint (`stepN`, or its `model_and_optim`). Nothing is written yet.

    A run that loads the converted optimizer state continues with its moments and its count of updates, at step 0 of its own
    data and schedule. OLMo-core's position in its data has no meaning here.

    Args:
        dtype: type of the weights by its name in safetensors; None: as they are. If it is narrower than the stored type, the
            stored values become the optimizer's master weights.
        optimizer: convert the optimizer state, if there is one.
        config: config.json, if it is not in the folder.

    Raises:
        ConversionError: the folder is damaged, unsafe or incomplete, or the model cannot be represented.
    """
    weights = folder if has_file(folder, METADATA) else folder / "model_and_optim"
    if not weights.is_dir():
        raise ConversionError(f"{folder}: there is no OLMo-core checkpoint; give a folder such as RUN/step1000")
    described = _config_path(folder, weights, config)
    settings = read_json(described)
    model = model_from_olmo_core(settings, eos_token_id, pad_token_id)
    weight_files = _Weights(TorchCheckpoint(weights), model)
    with_moments = optimizer and weight_files.has_moments()
    outputs = list(weight_files.outputs(dtype, with_moments))
    state = weight_files.state() if with_moments else dict(CONVERTED_STATE)
    files = split_into_files(outputs, max_file_bytes)
    origin = {"format": "olmo_core", "config": settings.get("model", settings)}

    def finish(written: Path, facts: Facts) -> None:
        write_index(written, facts, files, model, {"converted_from": origin}, state)

    return Conversion(target, files, [*weight_files.stored.files, described], with_hash=True, finish=finish)


def _config_path(folder: Path, weights: Path, given: Path | None) -> Path:
    if given is not None:
        return regular_file(given.parent, given.name)
    for place in (folder, weights.parent):
        if has_file(place, "config.json"):
            return regular_file(place, "config.json")
    raise ConversionError(f"{folder}: it has no config.json; give the run's with --config")


class _Weights:
    """The tensors of a checkpoint, matched with the true tensors of its model."""

    def __init__(self, stored: TorchCheckpoint, model: ModelConfig) -> None:
        """Raises:
        ConversionError: tensors are missing, unknown or of a wrong shape, or tied copies differ.
        """
        self.stored, self.model, self.specs = stored, model, model_tensors(model)
        self.keys = self._find_keys()
        """Key of each true tensor in the checkpoint."""

    def _find_keys(self) -> dict[str, str]:
        keys, missing = {}, []
        for name, spec in self.specs.items():
            candidates = [f"model.{theirs}" for theirs in olmo_core_names(name)]
            found = [key for key in candidates if key in self.stored.tensors]
            if len(found) == 1:
                keys[name] = found[0]
                self._check(found[0], spec)
            else:
                missing.append(f"{olmo_core_names(name)[0]}{' (twice, in two spellings)' if found else ''}")
        if missing:
            raise ConversionError(
                f"{self.stored.folder}: tensors are missing: {', '.join(missing[:5])} ({len(missing)} in all)"
            )
        used = {*keys.values(), *self._tied_head(keys)}
        unknown = [key for key in {*self.stored.tensors, *self.stored.others} - used if not key.startswith(_STATE)]
        if unknown:
            raise ConversionError(
                f"{self.stored.folder}: tensors that the model in config.json does not have: "
                f"{', '.join(sorted(unknown)[:5])}"
            )
        return keys

    def _check(self, key: str, spec: TensorSpec) -> None:
        """Check a tensor's type and shape. OLMo-core stores convolutions as [channels, 1, taps]."""
        tensor = self.stored.tensors[key]
        channels, *taps = spec.shape
        shape = (channels, 1, *taps) if is_convolution(spec.name) else spec.shape
        if tensor.shape != shape or tensor.dtype not in TORCH_NAMES:
            raise ConversionError(
                f"{self.stored.folder}: {key} is {tensor.dtype} {list(tensor.shape)}, and {list(shape)} by config.json"
            )

    def _tied_head(self, keys: dict[str, str]) -> list[str]:
        """Return the key of a tied model's copy of the embedding, if there is one that is equal."""
        head = f"model.{HEAD}"
        if not self.model.tie_embeddings or head not in self.stored.tensors:
            return []
        embedding, spec = keys["embedding.weight"], self.specs["embedding.weight"]
        self._check(head, spec)
        with OpenFiles(ConversionError) as files:
            blocks = (self.stored.source(key, key, spec.shape).blocks(files) for key in (embedding, head))
            if not all(a == b for a, b in zip(*blocks, strict=True)):
                raise ConversionError(f"{self.stored.folder}: tied in config.json, but {head} differs from {embedding}")
        return [head]

    def outputs(self, dtype: str | None, with_moments: bool) -> Iterator[OutputTensor]:
        """Yield the weights, and with them masters and moments if these are wanted."""
        for name, spec in self.specs.items():
            key = self.keys[name]
            stored = self.stored.tensors[key].dtype
            kept = stored_dtype(spec, stored, dtype)
            yield self._output(key, name, spec, kept)
            if not with_moments:
                continue
            if kept != "F32" and stored == "F32":
                yield self._output(key, state_name("master", name), spec, "F32")
            for moment in _MOMENTS:
                moment_key = _moment_key(key, moment)
                if moment_key not in self.stored.tensors:
                    raise ConversionError(f"{self.stored.folder}: {moment_key} is missing")
                self._check(moment_key, spec)
                yield self._output(moment_key, state_name(moment, name), spec, "F32")

    def _output(self, key: str, name: str, spec: TensorSpec, dtype: str) -> OutputTensor:
        return OutputTensor(name, dtype, spec.shape, lambda: self.stored.source(key, key, spec.shape))

    def has_moments(self) -> bool:
        """Return whether the state of an AdamW is there.

        Raises:
            ConversionError: it is there for some weights only, or there is other state.
        """
        known = {_moment_key(key, part) for key in self.keys.values() for part in (*_MOMENTS, "step")}
        found = {
            key
            for key in (*self.stored.tensors, *self.stored.others)
            if key.startswith(_STATE) and not key.startswith(_IGNORED)
        }
        found = {key for key in found if not key.startswith(f"optim.state.{HEAD}.")} | (found & known)
        if not found:
            return False
        wrong = sorted(found - known) or sorted(known - found)
        if wrong:
            what = "unknown" if found - known else "missing"
            raise ConversionError(
                f"{self.stored.folder}: {what} optimizer state: {', '.join(wrong[:3])}; --no-optimizer converts only the "
                "weights"
            )
        return True

    def state(self) -> dict[str, Any]:
        """Return the state of a run that continues with the moments."""
        return {"step": 0, "samples": 0, "updates": self._updates(), "skip_step": {"losses": [], "grad_norms": []}}

    def _updates(self) -> int:
        """Return the number of updates in the moments, which is the same for all weights."""
        keys = [_moment_key(key, "step") for key in self.keys.values()]
        steps = {self.stored.scalar(key) for key in keys if key in self.stored.tensors}
        if len(steps) != 1 or (count := steps.pop()) != int(count) or count < 0:
            raise ConversionError(
                f"{self.stored.folder}: weights have different numbers of updates; --no-optimizer converts only the weights"
            )
        return int(count)


def _moment_key(weight: str, moment: str) -> str:
    return f"optim.state.{weight.removeprefix('model.')}.{moment}"
