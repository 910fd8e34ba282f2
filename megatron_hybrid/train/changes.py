"""Differences between the run that saved a checkpoint and the run that starts from it."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import mixer_specs
from megatron_hybrid.base.errors import shown
from megatron_hybrid.checkpoint.format import CheckpointError
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.fingerprint import identity_changes
from megatron_hybrid.data.vocabulary import vocabulary_identity

_NOT_COMPUTED = (
    "model.init_std",
    "model.eos_token_id",
    "model.pad_token_id",
    "model.backend",
)
"""Model fields that leave a trained model's outputs as they are, besides those that mixers name. Their changes are reported,
not refused."""
_COMPUTES_SOMETHING_ELSE = "the trained weights would compute something else"
_CHANGED_BY_STAGES = ("model.rope_theta", "model.rope_scaling")
"""Fields of the model that a new stage may change: the rotary embedding has no weights."""
_ABSENT = "(absent)"


def config_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Return `{field: "old -> new"}` of every field in which two resolved configurations differ."""
    old, new = dict(_flat("", _resolved(before))), dict(_flat("", after))
    return {
        field: f"{old.get(field, _ABSENT)} -> {new.get(field, _ABSENT)}"
        for field in {**old, **new}
        if old.get(field) != new.get(field)
    }


def _resolved(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add the defaults of fields that did not exist when the configuration was saved. Leave out entries that are not sections."""
    sections = {name: run[name] for name in RunConfig.model_fields if name in run}
    try:
        return RunConfig.model_validate(sections).model_dump(mode="json")
    except ValidationError:  # saved by a version with other fields
        return sections


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else key, inner)
    elif isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value):
        for index, inner in enumerate(value):
            yield from _flat(f"{name}.{index}", inner)
    else:
        yield name, shown(list(value) if isinstance(value, tuple) else value)


def model_changes(before: ModelConfig, after: ModelConfig) -> dict[str, str]:
    """Return `{field: "old before, new now"}` of the model fields that change what trained weights compute."""
    old, new = (dict(_flat("model", _written_out(model))) for model in (before, after))
    return {
        field: f"{old.get(field, _ABSENT)} before, {new.get(field, _ABSENT)} now"
        for field in {**old, **new}
        if old.get(field) != new.get(field) and field not in _not_computed()
    }


def _not_computed() -> set[str]:
    mixers = (f"model.{spec.prefix}.{field}" for spec in mixer_specs() for field in spec.init_fields)
    return {*_NOT_COMPUTED, *mixers}


def _written_out(model: ModelConfig) -> dict[str, Any]:
    """Return a model's fields in a canonical form: fields with more than one spelling are resolved."""
    return model.model_dump(mode="json") | {
        "layer_pattern": "".join(model.layers),
        "head_dim": model.attention_head_dim,
        "num_key_value_heads": model.kv_heads,
    }


def data_changes(
    before: Mapping[str, Any], state: Mapping[str, Any], config: RunConfig, identity: dict[str, Any]
) -> dict[str, str]:
    """Return `{field: what changed}` of everything that determines the next samples.

    Args:
        before: configuration of the run that saved the checkpoint.
        state: state of that run, with the identity of its data. Checkpoints of earlier versions do not have one; then the
            configurations are compared.
        config: configuration of this run.
        identity: identity of this run's data.
    """
    if isinstance(known := state.get("data"), dict):
        return identity_changes(known, identity)
    if not isinstance(before.get("data"), Mapping):  # converted weights, without data
        return {}
    fields = ("data.train", "data.seed", "data.sequence_length")
    changes = config_changes(before, config.model_dump(mode="json"))
    return {field: text for field, text in changes.items() if field.startswith(fields)}


def stage_changes(before: object, config: RunConfig, changes: Mapping[str, str]) -> dict[str, str]:
    """Return `{field: "old before, new now"}` of the changes that the start of a new stage does not allow.

    Args:
        before: identity of the vocabulary (data/vocabulary.py) that the weights were trained on; None: unknown.
        changes: all changes of the model.
    """
    refused = {field: text for field, text in changes.items() if not field.startswith(_CHANGED_BY_STAGES)}
    now = vocabulary_identity(config)
    if isinstance(before, dict) and now is not None and before != now:
        names = (f"{v['ids']:,} ids, SHA-256 {str(v['sha256'])[:12]}" for v in (before, now))
        refused["data.tokenizer"] = "{} before, {} now".format(*names)
    return refused


def _consequence(field: str) -> str:
    if field == "data.tokenizer":
        return "token ids would mean other text"
    return "samples would be repeated or left out" if field.startswith("data") else _COMPUTES_SOMETHING_ELSE


def refuse_changes(folder: object, changes: Mapping[str, str], allowed: tuple[str, ...]) -> None:
    """Refuse changes that are not allowed.

    Raises:
        CheckpointError: names every such field, its values and the override that allows them.
    """
    wrong = {
        field: text
        for field, text in changes.items()
        if not any(field == name or field.startswith(f"{name}.") for name in allowed)
    }
    if not wrong:
        return
    lines = "\n".join(f"  {field}: {text}" for field, text in wrong.items())
    what = dict.fromkeys(map(_consequence, wrong))
    raise CheckpointError(
        f"{folder} was trained with other settings:\n{lines}\n"
        f"With these, {' and '.join(what)}. Restore them, start a new run with another run_dir, or accept the change: "
        f"'checkpoint.allow_changes=[{', '.join([*allowed, *wrong])}]'"
    )
