"""Names of true tensors (arch/tensors.py) in transformers' models.

An architecture gives the names of each kind of layer (`LayerNames`); `TensorNames` applies them to a model.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors

_OUR_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_THEIR_LAYER = re.compile(r"layers\.(0|[1-9][0-9]{0,4})\.(.+)")
PREFIX = "model."
OUTSIDE_LAYERS = {
    "embedding.weight": "embed_tokens.weight",
    "embedding_norm.weight": "embed_norm.weight",
    "final_norm.weight": "norm.weight",
}
"""Our name -> their name below the prefix."""
OUTPUT = {"output.weight": "lm_head.weight"}


def each(letters: Iterable[str], ours: str, theirs: str) -> dict[str, str]:
    """Return names by name, with `{}` replaced by each letter: "qk" gives two entries."""
    return {ours.format(letter): theirs.format(letter) for letter in letters}


@dataclass(frozen=True)
class LayerNames:
    """Tensor names in one kind of layer, without what precedes it in ours and theirs (`model.layers.N.`)."""

    names: Mapping[str, str]
    """Our name -> their name, in the spelling that exports write."""
    spellings: Mapping[str, str] = field(default_factory=dict)
    """Their name in other spellings -> their name in `names`."""
    convolutions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Their name of joined convolutions -> our names of the parts, in the order of rows.

    Their weights, joined or not, are [channels, 1, taps]; ours are [channels, taps]. Exports write the parts.
    """
    packed: Mapping[str, "Packed"] = field(default_factory=dict)
    """Their name -> our tensors whose rows it holds. Exports write it."""


@dataclass(frozen=True)
class Packed:
    """A tensor of theirs that holds all rows of several of ours."""

    parts: tuple[str, ...]
    """Our names, in the order of rows."""
    heads: str = ""
    """Field of ModelConfig: heads of each part, which take turns: head 0 of every part, then head 1. "": one part after the other."""
    convolution: bool = False
    """Their weight is [channels, 1, taps]; ours are [channels, taps]."""


@dataclass(frozen=True)
class Rows:
    """Rows of one of our tensors, in one of theirs."""

    ours: str
    first: int
    """First row in our tensor."""
    count: int
    at: int
    """First row in their tensor."""


@dataclass(frozen=True)
class TheirTensor:
    """A tensor of transformers' model, and our tensors that make it up."""

    name: str
    shape: tuple[int, ...]
    rows: tuple[Rows, ...]
    """In the order of their rows."""


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
    """Both directions of a model's tensor names.

    Args:
        prefix: of their names, except for the output matrix.
        other_prefixes: further prefixes that files may have.
    """

    def __init__(
        self,
        model: ModelConfig,
        layers: Mapping[str, LayerNames],
        prefix: str = PREFIX,
        other_prefixes: tuple[str, ...] = (),
    ) -> None:
        self._model, self._prefix = model, prefix
        self._prefixes = sorted((prefix, *other_prefixes), key=len, reverse=True)
        self._layers = [layers[kind] for kind in model.layers]
        self._specs = model_tensors(model)
        self._holders = {rows.ours: tensor for tensor in self.all() for rows in tensor.rows}

    def all(self) -> Iterator[TheirTensor]:
        """Yield every tensor of transformers' model, in the order in which ours begin in them."""
        done = set[str]()
        for ours in self._specs:
            if ours not in done:
                tensor = self._packed(ours) or self._alone(ours)
                done |= {rows.ours for rows in tensor.rows}
                yield tensor

    def holder(self, ours: str) -> TheirTensor:
        """Return the tensor of theirs that holds a tensor of ours."""
        return self._holders[ours]

    def theirs(self, ours: str) -> str:
        """`layers.3.attention.q_proj.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
        return self.holder(ours).name

    def _packed(self, ours: str) -> TheirTensor | None:
        index, rest = self._split(ours)
        for theirs, packed in self._layers[index].packed.items() if index is not None else ():
            if rest in packed.parts:
                parts = [f"layers.{index}.{part}" for part in packed.parts]
                total, inner = sum(self._specs[part].shape[0] for part in parts), self._specs[ours].shape[1:]
                shape = (total, 1, *inner) if packed.convolution else (total, *inner)
                heads = getattr(self._model, packed.heads) if packed.heads else 1
                return TheirTensor(self._in_layer(index, theirs), shape, tuple(self._in_turns(parts, heads)))
        return None

    def _in_turns(self, parts: list[str], heads: int) -> Iterator[Rows]:
        at = 0
        for head in range(heads):
            for part in parts:
                count = self._specs[part].shape[0] // heads
                yield Rows(part, head * count, count, at)
                at += count

    def _alone(self, ours: str) -> TheirTensor:
        index, rest = self._split(ours)
        shape = self._specs[ours].shape
        rows = (Rows(ours, 0, shape[0], 0),)
        if index is None:
            name = OUTPUT.get(ours) or self._prefix + OUTSIDE_LAYERS[ours]
            return TheirTensor(name, shape, rows)
        layer = self._layers[index]
        convolution = any(rest in parts for parts in layer.convolutions.values())
        return TheirTensor(
            self._in_layer(index, layer.names[rest]), (shape[0], 1, *shape[1:]) if convolution else shape, rows
        )

    def _in_layer(self, index: int | None, name: str) -> str:
        return f"{self._prefix}layers.{index}.{name}"

    def usual(self, theirs: str) -> str:
        """Return their name in the spelling of `theirs()`. Unknown names are returned as they are."""
        prefix = next((prefix for prefix in self._prefixes if theirs.startswith(prefix)), None)
        if prefix is None:
            return theirs
        rest = theirs.removeprefix(prefix)
        match = _THEIR_LAYER.fullmatch(rest)
        if match and int(match[1]) < len(self._layers):
            return self._in_layer(int(match[1]), self._layers[int(match[1])].spellings.get(match[2], match[2]))
        return self._prefix + rest if rest in OUTSIDE_LAYERS.values() else theirs

    def joined(self, ours: str) -> Joined | None:
        """Return the place of a convolution if files may have it joined with others, or None for other tensors."""
        index, rest = self._split(ours)
        for theirs, parts in self._layers[index].convolutions.items() if index is not None else ():
            if rest in parts:
                names = [f"layers.{index}.{part}" for part in parts]
                rows = [self._specs[name].shape[0] for name in names]
                first = sum(rows[: parts.index(rest)])
                their_parts = tuple(self.theirs(name) for name in names)
                return Joined(self._in_layer(index, theirs), their_parts, first, sum(rows))
        return None

    @staticmethod
    def _split(ours: str) -> tuple[int | None, str]:
        """Return the layer and the name in it; None outside of layers."""
        match = _OUR_LAYER.fullmatch(ours)
        return (int(match[1]), match[2]) if match else (None, ours)
