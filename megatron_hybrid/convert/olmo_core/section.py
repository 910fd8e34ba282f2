"""Objects in OLMo-core's config.json, read so that no field is overlooked."""

from typing import Any

_ANY = object()
"""Marks a field without effect on what the weights compute."""
_NORM = {
    "name": ("rms", "fused_rms", "cute_rms"),
    "elementwise_affine": (True, None),
    "bias": (False,),
    "full_precision": _ANY,
    "dtype": _ANY,
}
_FIELDS: dict[str, dict[str, Any]] = {
    "model": {
        "name": ("default",), "dtype": _ANY, "init_method": _ANY, "init_seed": _ANY, "embedding_init_std": _ANY, "freeze_params": _ANY,
    },
    "block": {
        "dropout": (None, 0), "attention_residual_alpha": (None, 1), "feed_forward_residual_alpha": (None, 1),
        "feed_forward_moe": (None,),
    },
    "layer_norm": _NORM,
    "feed_forward": {"name": ("default",), "bias": (False,), "dtype": _ANY, "activation": ("silu", None)},
    "lm_head": {"name": ("default",), "bias": (False,), "dtype": _ANY, "loss_implementation": _ANY},
    "attention": {
        "name": ("default", "fused", None), "type": ("attention", None), "bias": (False,), "clip_qkv": (None,),
        "dropout": (None, 0), "use_flash": _ANY, "backend": _ANY, "dtype": _ANY, "scalable_softmax": (None, False),
        "qk_norm_per_head_gains": (None, False), "attention_sinks": (None, False), "use_recompute_qkv_prep": _ANY,
    },
    "gate": {"granularity": ("elementwise",), "full_precision": (True, None)},
    "gated_delta_net": {"type": ("gated_delta_net",), "conv_bias": (False, None), "dtype": _ANY},
    "rope": {
        "name": ("default", "fused"), "full_precision": _ANY, "no_global_rope": (None, False),
        "partial_rotary_factor": (None, 1),
    },
    "rope_scaling": {},
    "sliding_window": {},
    "fla": {"name": ("GatedDeltaNet",), "dtype": _ANY},
    "fla_layer_kwargs": {"use_gate": (True,), "use_short_conv": (True,), "mode": _ANY, "conv_bias": (False,)},
}  # fmt: skip
"""Fields whose values do not matter, or must be one of these."""
_NO_DEFAULT = {"bias", "granularity"}
"""Fields that must be there, because their defaults differ between versions or cannot be represented."""


class Section:
    """One object of the file. Fields that are not read are problems.

    Args:
        data: the object.
        kind: its entry in the table of fields.
        where: its name in problems.
        problems: problems are added to it; nothing is raised.
    """

    def __init__(self, data: object, kind: str, where: str, problems: list[str]) -> None:
        self.where, self.problems = where, problems
        self.data: dict[str, Any] = data if isinstance(data, dict) else {}
        if not isinstance(data, dict):
            problems.append(f"{where} is {data!r:.100}, not an object")
        self.read = {"_CLASS_"}
        for name, values in _FIELDS[kind].items():
            self.read.add(name)
            if values is _ANY or (name not in self.data and name not in _NO_DEFAULT):
                continue
            if self.data.get(name) not in values:
                problems.append(
                    f"{where}.{name} = {self.data.get(name)!r:.100} cannot be represented; only {values[0]!r} can"
                )

    def get(self, name: str, kind: type | tuple[type, ...] = object, default: Any = None) -> Any:
        """Return a field's value if it has one of these types, or else None and add a problem. `default=...`: it must be there."""
        self.read.add(name)
        value = self.data.get(name)
        if value is None:
            if default is ...:
                self.problems.append(f"{self.where}.{name} is missing")
            return None if default is ... else default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds and object not in kinds):
            self.problems.append(f"{self.where}.{name} is {value!r:.100}")
            return None
        return value

    def section(self, name: str, kind: str) -> "Section":
        """Return the object that a field holds."""
        return Section(self.get(name), kind, f"{self.where}.{name}", self.problems)

    def done(self) -> None:
        """Add a problem for each field that has not been read."""
        for name in sorted(self.data.keys() - self.read):
            if self.data[name] is not None:
                self.problems.append(f"{self.where}: unknown field {name!r:.100} = {self.data[name]!r:.100}")
