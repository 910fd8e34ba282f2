"""Names of true tensors (arch/tensors.py) in transformers' models.

An architecture gives the names of each kind of layer (`LayerNames`); `TensorNames` applies them to a model.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors

_OUR_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_THEIR_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.(.+)")
OUTSIDE_LAYERS = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def each(letters: Iterable[str], ours: str, theirs: str) -> dict[str, str]:
    """Return names by name, with `{}` replaced by each letter: "qk" gives two entries."""
    return {ours.format(letter): theirs.format(letter) for letter in letters}


@dataclass(frozen=True)
class LayerNames:
    """Tensor names in one kind of layer, without the prefixes `layers.N.` and `model.layers.N.`."""

    names: Mapping[str, str]
    """Our name -> their name, in the spelling that exports write."""
    spellings: Mapping[str, str] = field(default_factory=dict)
    """Their name in other spellings -> their name in `names`."""
    convolutions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Their name of joined convolutions -> our names of the parts, in the order of rows.

    Their weights, joined or not, are [channels, 1, taps]; ours are [channels, taps].
    """


@dataclass(frozen=True)
class Joined:
    """A convolution that may be stored as rows of a joined tensor, or in parts."""

    joined: str
    """Their name of the joined tensor."""
    parts: tuple[str, ...]
    """Their names of the parts, in the order of rows."""
    first: int
    """First row of the wanted tensor in the joined one."""
    rows: int
    """Rows of the joined tensor."""


class TensorNames:
    """Both directions of a model's tensor names."""

    def __init__(self, model: ModelConfig, layers: Mapping[str, LayerNames]) -> None:
        self._layers = [layers[kind] for kind in model.layers]
        self._specs = model_tensors(model)

    def theirs(self, ours: str) -> str:
        """`layers.3.attention.q_proj.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
        if ours in OUTSIDE_LAYERS:
            return OUTSIDE_LAYERS[ours]
        index, rest = self._split(ours)
        return f"model.layers.{index}.{self._layers[index].names[rest]}"

    def usual(self, theirs: str) -> str:
        """Return their name in the spelling of `theirs()`. Unknown names are returned as they are."""
        match = _THEIR_LAYER.fullmatch(theirs)
        if not match or int(match[1]) >= len(self._layers):
            return theirs
        return f"model.layers.{match[1]}.{self._layers[int(match[1])].spellings.get(match[2], match[2])}"

    def their_shape(self, ours: str) -> tuple[int, ...]:
        """Return the shape of a tensor in transformers' model."""
        shape = self._specs[ours].shape
        return (shape[0], 1, *shape[1:]) if self.joined(ours) else shape

    def joined(self, ours: str) -> Joined | None:
        """Return the place of a convolution if it is joined with others, or None for other tensors."""
        if ours in OUTSIDE_LAYERS:
            return None
        index, rest = self._split(ours)
        for theirs, parts in self._layers[index].convolutions.items():
            if rest in parts:
                names = [f"layers.{index}.{part}" for part in parts]
                rows = [self._specs[name].shape[0] for name in names]
                first = sum(rows[: parts.index(rest)])
                their_parts = tuple(self.theirs(name) for name in names)
                return Joined(f"model.layers.{index}.{theirs}", their_parts, first, sum(rows))
        return None

    @staticmethod
    def _split(ours: str) -> tuple[int, str]:
        match = _OUR_LAYER.fullmatch(ours)
        assert match is not None, ours
        return int(match[1]), match[2]
