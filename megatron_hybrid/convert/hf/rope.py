"""Rotary embedding in config.json, in every form that transformers has written.

    4.57          rope_theta, and rope_scaling for full attention layers
    5.0 to 5.12   rope_parameters: {rope_type, rope_theta, ...}
    from 5.13     rope_parameters: {full_attention: {...}, sliding_attention: {...}} (olmo3)

Files that several versions have gone through hold several forms. They must say the same, for no version reads them all.
"""

import math
from typing import Any

from megatron_hybrid.convert.hf_fields import Fields

_LAYERS = ("full_attention", "sliding_attention")
_TYPE = ("rope_type", "type")
_YARN = {
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate",
}  # fmt: skip
_MISSING = object()
_NEW_DEFAULT_THETA = 500_000
"""Of olmo3's sliding layers from transformers 5.13 on, where no rope_parameters name them."""

Rope = tuple[float | None, dict[str, Any] | None]
"""(theta, fields of RopeScalingConfig)."""


def rope_from_hf(fields: Fields, layers: list[str]) -> Rope:
    """Theta and scaling of the model; theta None where it has no rotary embedding.

    `olmo_hybrid` without rotary embedding is said in three ways: `rope_parameters: null`, `rope_parameters: {"rope_theta":
    null}` and, by OLMo-core's exporter, `rope_theta: null`. A file that says nothing at all is not guessed about.

    Args:
        layers: the kinds of the model's layers; what the file says of others is ignored.
    """
    config = fields.config
    if not config.keys() & {"rope_parameters", "rope_theta"} and not config.get("rope_scaling"):
        fields.problems.append(
            "neither rope_parameters nor rope_theta is there; add rope_parameters (null: no rotary embedding)"
        )
        return None, None
    count = len(fields.problems)
    full, sliding = _both_kinds(fields)
    sliding = sliding if "W" in layers else []
    full = full if "A" in layers or not sliding else []
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
        return _checked(fields, thetas[0], scalings[0], "W" in layers)
    return None, None


def _checked(fields: Fields, theta: Any, scaling: dict[str, Any] | None, windowed: bool) -> Rope:
    if theta is None:
        if fields.kind == "olmo3":
            fields.problems.append("rope_theta is null, and olmo3 always has rotary embedding")
        return None, None
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        fields.problems.append(f"rope_theta {theta!r:.100} is not a number")
        return None, None
    parameters = fields.config.get("rope_parameters") or {}
    if windowed and "sliding_attention" not in parameters and theta != _NEW_DEFAULT_THETA:
        fields.notes.append(
            f"rope_theta {theta:g} is taken for all layers, as transformers before 5.13 does; later ones read this file "
            f"with {_NEW_DEFAULT_THETA:,} for sliding attention"
        )
    return theta, scaling


def _both_kinds(fields: Fields) -> tuple[list[Rope], list[Rope]]:
    """What each form in the file says of full attention layers, and of sliding ones."""
    config = fields.config
    parameters, scaling = config.get("rope_parameters"), config.get("rope_scaling") or None
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            fields.problems.append(f"{name} is {value!r:.100}, not an object")
            return [], []
    flat = {name: value for name, value in (parameters or {}).items() if name not in _LAYERS}
    nested = {name: value for name, value in (parameters or {}).items() if name in _LAYERS}
    top = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    full: list[Rope] = []
    sliding: list[Rope] = []
    for name in sorted(nested):
        if not isinstance(nested[name], dict):
            fields.problems.append(f"rope_parameters.{name} is {nested[name]!r:.100}, not an object")
            continue
        over = scaling if name == "full_attention" and scaling else {}  # as transformers lays it over
        found = _one(fields, f"rope_parameters.{name}", top | nested[name] | over)
        (full if name == "full_attention" else sliding).append(found)
    if flat or (parameters is not None and not nested):
        full.append(_one(fields, "rope_parameters", top | flat))
    if scaling and not nested:
        full.append(_one(fields, "rope_scaling", top | scaling))
    if not (full or sliding) or (top and fields.kind == "olmo3"):  # 4.57 reads this one, whatever else there is
        full.append((top.get("rope_theta"), full[0][1] if full else None))
    return full, sliding


def _one(fields: Fields, where: str, parameters: dict[str, Any]) -> Rope:
    """Theta and scaling of one object; complains of what it cannot represent."""
    kind = next((parameters[name] for name in _TYPE if parameters.get(name) is not None), "default")
    allowed = {"rope_theta", "partial_rotary_factor", *_TYPE} | (_YARN if kind == "yarn" else set())
    set_fields = {name for name, value in parameters.items() if value is not None}
    partial = parameters.get("partial_rotary_factor", 1)
    if kind not in ("default", "yarn") or set_fields - allowed or partial not in (1, None):
        fields.problems.append(
            f"{where} = {parameters!r:.200} cannot be represented; only plain rotary embedding and yarn can"
        )
        return None, None
    if "rope_theta" not in parameters:
        fields.problems.append(f"{where}.rope_theta is missing")
    return parameters.get("rope_theta"), _yarn(fields, where, parameters) if kind == "yarn" else None


def _yarn(fields: Fields, where: str, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """transformers' yarn parameters as fields of RopeScalingConfig, with transformers' defaults."""
    numbers = {name: parameters.get(name) for name in sorted(_YARN - {"truncate"})}
    wrong = [
        name
        for name, v in numbers.items()
        if (v is None and name == "factor") or (v is not None and (type(v) not in (int, float) or v < 0))
    ]
    if wrong:
        fields.problems.append(f"{where}: {', '.join(wrong)} of yarn must be a positive number: {parameters!r:.200}")
        return None
    if parameters.get("truncate") not in (True, None):
        fields.problems.append(
            f"{where}.truncate = {parameters['truncate']!r:.50} cannot be represented; only true can"
        )
    original = numbers["original_max_position_embeddings"] or fields.get("max_position_embeddings", int, ...)
    n = {name: None if value is None else _float(value) for name, value in numbers.items()}
    attention, plain = n["attention_factor"], _mscale(n["factor"], 1.0)
    if attention is None and n["mscale"] and n["mscale_all_dim"]:
        attention = _mscale(n["factor"], n["mscale"]) / _mscale(n["factor"], n["mscale_all_dim"])
    return {
        "factor": n["factor"],
        "original_max_position_embeddings": original,
        "attention_factor": None if attention == plain else attention,
        "beta_fast": n["beta_fast"] or 32.0,
        "beta_slow": n["beta_slow"] or 1.0,
    }


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _float(value: float) -> float:
    """An integer of thousands of digits becomes an infinity, which RopeScalingConfig refuses."""
    try:
        return float(value)
    except OverflowError:
        return math.inf
