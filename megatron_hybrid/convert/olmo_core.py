"""OLMo-core's native checkpoints to ours: weights, and the optimizer's moments where they are there."""

import re
from pathlib import Path

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import TensorSpec, model_tensors
from megatron_hybrid.checkpoint.format import state_name
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.folder import has_file, read_json, regular_file
from megatron_hybrid.convert.from_hf import MAX_FILE_BYTES, our_dtype
from megatron_hybrid.convert.job import Conversion, Facts, split_into_files
from megatron_hybrid.convert.olmo_core_config import model_from_olmo_core
from megatron_hybrid.convert.our_files import CONVERTED_STATE, write_index
from megatron_hybrid.convert.safetensors_writer import OutputTensor
from megatron_hybrid.convert.source import TORCH_NAMES, OpenFiles
from megatron_hybrid.convert.torch_checkpoint import METADATA, TorchCheckpoint

_OUTSIDE = {
    "embedding.weight": "embeddings.weight",
    "final_norm.weight": "lm_head.norm.weight",
    "output.weight": "lm_head.w_out.weight",
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_BLOCK = {
    "mixer_norm": "attention_norm", "mlp_norm": "feed_forward_norm", "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
}  # fmt: skip
_MIXER = {
    "gate_proj": "w_g",
    "o_proj": "w_out",
    **{f"{p}_proj": f"w_{p}" for p in "qkvab"},
    **{f"{p}_conv": f"{p}_conv1d" for p in "qkv"},
}
_OLD_MIXER = {"gate_proj": "g_proj", **{f"{p}_conv": f"{p}_conv1d" for p in "qkv"}}
_MOMENTS = ("exp_avg", "exp_avg_sq")
_IGNORED = ("optim.param_groups.",)


def olmo_core_names(tensor: str) -> list[str]:
    """A true tensor's name in OLMo-core 3.0, and in the branch where the layer was fla's own (`blocks.i.fla.inner.*`)."""
    if tensor in _OUTSIDE:
        return [_OUTSIDE[tensor]]
    match = _LAYER.fullmatch(tensor)
    assert match is not None
    prefix, rest = f"blocks.{match[1]}", match[2]
    mixer, _, part = rest.partition(".")
    if mixer in ("gdn", "attention"):
        stem, dot, suffix = part.partition(".")
        names = [f"{prefix}.attention.{_MIXER.get(stem, stem)}{dot}{suffix}"]
        return [*names, f"{prefix}.fla.inner.{_OLD_MIXER.get(stem, stem)}{dot}{suffix}"] if mixer == "gdn" else names
    stem = rest.removesuffix(".weight")
    names = [f"{prefix}.{_BLOCK[stem]}.weight"]
    return [*names, f"{prefix}.fla_norm.weight"] if stem == "mixer_norm" else names


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
    """Plan the conversion of an OLMo-core checkpoint (`stepN`, or its `model_and_optim`); nothing is written yet.

    With its optimizer's state, a run that loads it goes on with these moments and count of updates, at step 0 of its own data
    and schedule: OLMo-core's place in its data means nothing in ours.

    Args:
        dtype: safetensors' name of the type to keep weights in; None: as they are. Where that is narrower than what was
            stored, the stored values go along as the optimizer's master weights.
        optimizer: take the optimizer's state too, where there is one.
        config: config.json, where it does not lie in the folder.

    Raises:
        ConversionError: a folder that is damaged, unsafe or incomplete, or a model that cannot be represented.
    """
    weights = folder if has_file(folder, METADATA) else folder / "model_and_optim"
    if not weights.is_dir():
        raise ConversionError(f"{folder}: no checkpoint of OLMo-core is there; give a folder such as RUN/step1000")
    described = _config_path(folder, weights, config)
    settings = read_json(described)
    model = model_from_olmo_core(settings, eos_token_id, pad_token_id)
    stored = TorchCheckpoint(weights)
    keys = _weight_keys(stored, model)
    tensors = []
    with_moments = optimizer and _has_moments(stored, keys)
    for name, spec in model_tensors(model).items():
        key = keys[name]
        kept = our_dtype(spec, stored.tensors[key].dtype, dtype)
        tensors.append(_output(stored, key, name, spec, kept))
        if with_moments:
            if kept != "F32" and stored.tensors[key].dtype == "F32":
                tensors.append(_output(stored, key, state_name("master", name), spec, "F32"))
            for moment in _MOMENTS:
                tensors.append(_output(stored, _moment_key(keys[name], moment), state_name(moment, name), spec, "F32"))
    state = dict(CONVERTED_STATE)
    if with_moments:
        state = {
            "step": 0,
            "samples": 0,
            "updates": _updates(stored, keys),
            "skip_step": {"losses": [], "grad_norms": []},
        }
    files = split_into_files(tensors, max_file_bytes)
    origin = {"format": "olmo_core", "config": settings.get("model", settings)}

    def finish(written: Path, facts: Facts) -> None:
        write_index(written, facts, files, model, origin, state)

    return Conversion(target, files, [*stored.files, described], with_hash=True, finish=finish)


def _config_path(folder: Path, weights: Path, given: Path | None) -> Path:
    if given is not None:
        return regular_file(given.parent, given.name)
    for place in (folder, weights.parent):
        if has_file(place, "config.json"):
            return regular_file(place, "config.json")
    raise ConversionError(f"{folder}: it has no config.json; name the run's with --config")


def _weight_keys(stored: TorchCheckpoint, model: ModelConfig) -> dict[str, str]:
    """Where each true tensor is, and that nothing else is there."""
    specs, keys, used, missing = model_tensors(model), {}, set(), []
    for name, spec in specs.items():
        found = [key for key in (f"model.{n}" for n in olmo_core_names(name)) if key in stored.tensors]
        if len(found) != 1:
            missing.append(f"{olmo_core_names(name)[0]}{' (twice, in two spellings)' if found else ''}")
            continue
        (keys[name],) = found
        used.add(found[0])
        _check(stored, found[0], spec)
    if missing:
        raise ConversionError(f"{stored.folder}: tensors are missing: {', '.join(missing[:5])} ({len(missing)} in all)")
    if model.tie_embeddings and (head := f"model.{_OUTSIDE['output.weight']}") in stored.tensors:
        _check_tied(stored, keys["embedding.weight"], head, specs["embedding.weight"])
        used.add(head)
    unknown = [key for key in stored.tensors.keys() - used if not key.startswith("optim.")]
    unknown += [key for key in stored.others if not key.startswith("optim.")]
    if unknown:
        raise ConversionError(
            f"{stored.folder}: tensors that the model in config.json does not have: {', '.join(sorted(unknown)[:5])}"
        )
    return keys


def _check(stored: TorchCheckpoint, key: str, spec: TensorSpec) -> None:
    tensor = stored.tensors[key]
    shape = (spec.shape[0], 1, spec.shape[1]) if spec.decay_group == "convolution" else spec.shape
    if tensor.shape != shape or tensor.dtype not in TORCH_NAMES:
        raise ConversionError(
            f"{stored.folder}: {key} is {tensor.dtype} {list(tensor.shape)}, and {list(shape)} by config.json"
        )


def _check_tied(stored: TorchCheckpoint, embedding: str, head: str, spec: TensorSpec) -> None:
    _check(stored, head, spec)
    with OpenFiles() as files:
        blocks = (stored.source(key, key, spec.shape).blocks(files) for key in (embedding, head))
        if not all(a == b for a, b in zip(*blocks, strict=True)):
            raise ConversionError(f"{stored.folder}: tied in config.json, but {head} differs from {embedding}")


def _moment_key(weight: str, moment: str) -> str:
    return f"optim.state.{weight.removeprefix('model.')}.{moment}"


def _has_moments(stored: TorchCheckpoint, keys: dict[str, str]) -> bool:
    """Whether the state of an AdamW is there: for every weight, or for none."""
    known = {_moment_key(key, part) for key in keys.values() for part in (*_MOMENTS, "step")}
    there = {
        key for key in (*stored.tensors, *stored.others) if key.startswith("optim.") and not key.startswith(_IGNORED)
    }
    there = {key for key in there if not key.startswith(f"optim.state.{_OUTSIDE['output.weight']}.")} | (there & known)
    if not there:
        return False
    wrong = sorted(there - known) or sorted(known - there)
    if wrong:
        what = "unknown" if there - known else "missing"
        raise ConversionError(
            f"{stored.folder}: {what} optimizer state: {', '.join(wrong[:3])}; --no-optimizer converts the weights alone"
        )
    return True


def _updates(stored: TorchCheckpoint, keys: dict[str, str]) -> int:
    """How many updates the moments have seen: the same for every weight."""
    steps = {stored.scalar(key) for key in (_moment_key(k, "step") for k in keys.values()) if key in stored.tensors}
    if len(steps) != 1 or (count := steps.pop()) != int(count) or count < 0:
        raise ConversionError(
            f"{stored.folder}: weights have different numbers of updates; --no-optimizer converts the weights alone"
        )
    return int(count)


def _output(stored: TorchCheckpoint, key: str, name: str, spec: TensorSpec, dtype: str) -> OutputTensor:
    if key not in stored.tensors:
        raise ConversionError(f"{stored.folder}: {key} is missing")
    if not name.startswith("optimizer.master/"):
        _check(stored, key, spec)
    return OutputTensor(name, dtype, spec.shape, lambda: stored.source(key, key, spec.shape))
