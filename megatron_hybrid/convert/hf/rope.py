"""Rotary embedding in config.json, in every form that transformers has written.

    4.57          rope_theta, and rope_scaling for full attention layers
    5.0 to 5.12   rope_parameters: {rope_type, rope_theta, ...}
    from 5.13     rope_parameters: {full_attention: {...}, sliding_attention: {...}} (architectures with both)

A file that several versions have written holds several forms. They must agree, because no version reads all of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.convert.hf.fields import Fields

_LAYER_TYPES = ("full_attention", "sliding_attention")
_TYPE = ("rope_type", "type")
_YARN_NUMBERS = (
    "attention_factor", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim", "original_max_position_embeddings",
)  # fmt: skip
_YARN = {*_YARN_NUMBERS, "truncate"}
_NEW_DEFAULT_THETA = 500_000
"""Theta of sliding layers in transformers from 5.13 on, if rope_parameters does not name them."""

Rope = tuple[Any, dict[str, Any] | None]
"""(theta, fields of RopeScalingConfig)."""


@dataclass(frozen=True)
class RopeForms:
    """Forms of rotary embedding that an architecture has."""

    optional: bool
    """A model may have no rotary embedding: theta is null."""
    per_layer_type: bool
    """Full and sliding attention have separate parameters, and older files have `rope_theta` and `rope_scaling`."""
    partial: bool = False
    """`partial_rotary_factor` may have any value. The architecture reads it."""
    never: bool = False
    """The architecture has no rotary embedding and ignores the fields."""
    kept: frozenset[str] = frozenset()
    """Parameters without effect on text, which an export contains again."""


def read_rope(fields: Fields, layer_types: Sequence[str], forms: RopeForms) -> Rope:
    """Return theta and scaling of the model. Theta is None if it has no rotary embedding.

    No rotary embedding is spelled `rope_parameters: null`, `rope_parameters: {"rope_theta": null}`, `{"rope_type": null}` or, by
    OLMo-core's exporter, `rope_theta: null`. A file without any of these fields is refused: their default differs between versions.

    Args:
        layer_types: types of the model's layers. Parameters of other types are ignored.
    """
    config = fields.config
    if forms.never:
        return None, None
    if not config.keys() & {"rope_parameters", "rope_theta"} and not config.get("rope_scaling"):
        fields.problems.append(
            "neither rope_parameters nor rope_theta is there; add rope_parameters (null: no rotary embedding)"
        )
        return None, None
    count = len(fields.problems)
    full, sliding = _all_forms(fields, forms)
    sliding = sliding if "sliding_attention" in layer_types else []
    full = full if "full_attention" in layer_types or not sliding else []
    if len(fields.problems) > count:
        return None, None
    thetas, scalings = [theta for theta, _ in (*full, *sliding)], [scaling for _, scaling in full] or [None]
    if any(theta != thetas[0] for theta in thetas):
        fields.problems.append(
            f"rope_parameters, rope_theta and rope_scaling give layers different theta: {thetas!r:.200}; one for all can be "
            "represented"
        )
    elif any(scaling != scalings[0] for scaling in scalings):
        fields.problems.append(f"rope_parameters and rope_scaling differ: {scalings!r:.300}; remove the wrong one")
    elif any(scaling for _, scaling in sliding):
        fields.problems.append("rope_parameters.sliding_attention is scaled, and only full attention can be")
    else:
        return _checked(fields, thetas[0], scalings[0], layer_types, forms)
    return None, None


def _checked(
    fields: Fields, theta: Any, scaling: dict[str, Any] | None, layer_types: Sequence[str], forms: RopeForms
) -> Rope:
    if theta is None:
        if not forms.optional:
            fields.problems.append("rope_theta is null, and this architecture always has rotary embedding")
        return None, None
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        fields.problems.append(f"rope_theta {theta!r:.100} is not a number")
        return None, None
    theta = _float(theta)
    parameters = fields.config.get("rope_parameters") or {}
    named = "sliding_attention" not in layer_types or "sliding_attention" in parameters
    if not named and theta != _NEW_DEFAULT_THETA:
        fields.notes.append(
            f"rope_theta {theta:g} is taken for all layers, as transformers before 5.13 does; later ones read this file "
            f"with {_NEW_DEFAULT_THETA:,} for sliding attention"
        )
    return theta, scaling


def _all_forms(fields: Fields, forms: RopeForms) -> tuple[list[Rope], list[Rope]]:
    """Return what each form in the file gives for full attention layers, and for sliding ones."""
    config = fields.config
    parameters, scaling = config.get("rope_parameters"), config.get("rope_scaling") or None
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            fields.problems.append(f"{name} is {value!r:.100}, not an object")
            return [], []
    flat = {name: value for name, value in (parameters or {}).items() if name not in _LAYER_TYPES}
    nested = {name: value for name, value in (parameters or {}).items() if name in _LAYER_TYPES}
    top = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    full, sliding = _nested_forms(fields, nested, top, scaling, forms)
    if flat or (parameters is not None and not nested):
        full.append(_read_one(fields, "rope_parameters", top | flat, forms))
    if scaling and not nested:
        full.append(_read_one(fields, "rope_scaling", top | scaling, forms))
    if not (full or sliding) or (top and forms.per_layer_type):  # 4.57 reads this form, even if there are others
        full.append((top.get("rope_theta"), full[0][1] if full else None))
    return full, sliding


def _nested_forms(
    fields: Fields, nested: dict[str, Any], top: dict[str, Any], scaling: dict[str, Any] | None, forms: RopeForms
) -> tuple[list[Rope], list[Rope]]:
    found: dict[str, list[Rope]] = {name: [] for name in _LAYER_TYPES}
    for name in sorted(nested):
        if not isinstance(nested[name], dict):
            fields.problems.append(f"rope_parameters.{name} is {nested[name]!r:.100}, not an object")
            continue
        over = scaling if name == "full_attention" and scaling else {}  # transformers applies it on top
        found[name].append(_read_one(fields, f"rope_parameters.{name}", top | nested[name] | over, forms))
    return found["full_attention"], found["sliding_attention"]


def _read_one(fields: Fields, where: str, parameters: dict[str, Any], forms: RopeForms) -> Rope:
    """Return theta and scaling of one object. Adds a problem if they cannot be represented."""
    if "rope_theta" not in parameters and parameters.get("rope_type", "default") is None:
        return None, None
    kind = next((parameters[name] for name in _TYPE if parameters.get(name) is not None), "default")
    allowed = {"rope_theta", "partial_rotary_factor", *_TYPE} | (_YARN if kind == "yarn" else set()) | forms.kept
    set_fields = {name for name, value in parameters.items() if value is not None}
    partial = 1 if forms.partial else parameters.get("partial_rotary_factor", 1)
    if kind not in ("default", "yarn") or set_fields - allowed or partial not in (1, None):
        fields.problems.append(
            f"{where} = {parameters!r:.200} cannot be represented; only plain rotary embedding and yarn can"
        )
        return None, None
    if "rope_theta" not in parameters:
        fields.problems.append(f"{where}.rope_theta is missing")
    return parameters.get("rope_theta"), _read_yarn(fields, where, parameters) if kind == "yarn" else None


def _read_yarn(fields: Fields, where: str, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """Return transformers' yarn parameters as fields of RopeScalingConfig, with transformers' defaults."""
    numbers = {name: parameters.get(name) for name in _YARN_NUMBERS}
    wrong = [name for name, value in numbers.items() if not _is_positive(value, optional=name != "factor")]
    if wrong:
        fields.problems.append(f"{where}: {', '.join(wrong)} of yarn must be a positive number: {parameters!r:.200}")
        return None
    if parameters.get("truncate") not in (True, None):
        fields.problems.append(
            f"{where}.truncate = {parameters['truncate']!r:.50} cannot be represented; only true can"
        )
    original = numbers["original_max_position_embeddings"] or fields.get("max_position_embeddings", int, ...)
    n = {name: 0.0 if value is None else _float(value) for name, value in numbers.items()}  # absent is like 0
    attention = None if numbers["attention_factor"] is None else n["attention_factor"]
    if attention is None and n["mscale"] and n["mscale_all_dim"]:
        attention = _mscale(n["factor"], n["mscale"]) / _mscale(n["factor"], n["mscale_all_dim"])
    return {
        "factor": n["factor"],
        "original_max_position_embeddings": original,
        "attention_factor": None if attention == _mscale(n["factor"], 1.0) else attention,
        "beta_fast": n["beta_fast"] or 32.0,
        "beta_slow": n["beta_slow"] or 1.0,
    }


def _is_positive(value: object, optional: bool) -> bool:
    if value is None:
        return optional
    return isinstance(value, int | float) and not isinstance(value, bool) and not value < 0


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _float(value: float) -> float:
    """Return a float. An integer of thousands of digits becomes infinite, which the configuration refuses."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def write_rope(model: ModelConfig, forms: RopeForms, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary embedding in every form that a version of transformers reads.

    No rotary embedding is written as a null theta: transformers 5 turns null rope_parameters into its default theta, 10,000.

    Args:
        origin: the language model's fields in the config.json that the model was converted from.
    """
    if forms.never:
        return {"rope_parameters": None}
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    plain |= {name: value for name, value in (origin.get("rope_parameters") or {}).items() if name in forms.kept}
    if forms.partial:
        plain["partial_rotary_factor"] = model.rotary_factor
    scaling: dict[str, Any] = {}
    if model.rope_scaling is not None:
        attention_factor = model.rope_scaling.effective_attention_factor
        scaling = model.rope_scaling.model_dump() | {"attention_factor": attention_factor}
    full = plain | scaling
    if not forms.per_layer_type:
        return {"rope_parameters": full}
    flat = {"rope_theta": model.rope_theta} | ({"rope_scaling": scaling} if scaling else {})
    return {"rope_parameters": {"full_attention": full, "sliding_attention": plain}, **flat}
