"""Layout of true tensors in the parameters of this rank's model chunks."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from megatron_hybrid.arch.layer import fused_norms, layer_parameters, outer_parameters
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.packing import PackedParameter, PackedSlice
from megatron_hybrid.arch.registry import mixer_spec

Slices = tuple[PackedSlice, ...]
_LAYERS = "decoder.layers."


class ParamLayout:
    """Slices of true tensors in every parameter of this rank's model chunks.

    Args:
        model: the true sizes.
        rank: of this rank in the tensor parallel group.
        ranks: the group's size.
    """

    def __init__(self, model: ModelConfig, rank: int, ranks: int) -> None:
        self.model, self.rank, self.ranks = model, rank, ranks
        outer = outer_parameters(model)
        self._outer = {parameter.name: parameter for parameter in outer.values()}
        self._outer.setdefault("output_layer.weight", outer["embedding"])  # tied, on the last of several stages
        self._layers = {symbol: self._by_name(symbol) for symbol in model.blocks_by_symbol}

    def _by_name(self, symbol: str) -> dict[str, PackedParameter]:
        """Return the parameters of a block's layer by name, those of fused norms by both of their names."""
        block = self.model.known_blocks[symbol]
        named = {parameter.name: parameter for parameter in layer_parameters(self.model, block)}
        fused = {name: named[own] for name, own in fused_norms(mixer_spec(block.mixer)).items() if own in named}
        return named | fused

    def parameters(self, chunks: Iterable[Any]) -> Iterator[tuple[str, torch.nn.Parameter, Slices]]:
        """Yield (name, parameter, slices) of every parameter.

        Names are unique over the chunks and the same under every layout of pipeline stages. A tied output projection on the
        last stage has the embedding's slices.
        """
        for chunk in chunks:
            offset = self._offset(chunk)
            for name, parameter in chunk.named_parameters():
                yield self.global_name(name, offset), parameter, self.slices(name, offset)

    def packed_parameters(self, chunks: Iterable[Any]) -> Iterator[tuple[torch.nn.Parameter, PackedParameter]]:
        """Yield every parameter with the description of its packing. Tensor names are relative to the layer."""
        for chunk in chunks:
            offset = self._offset(chunk)
            for name, parameter in chunk.named_parameters():
                yield parameter, self._packed(name, offset)

    @staticmethod
    def _offset(chunk: Any) -> int:
        """Return how many layers come before a chunk."""
        return chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0

    @staticmethod
    def global_name(name: str, layer_offset: int) -> str:
        """Return the name of a chunk's parameter or module over all pipeline stages."""
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"] and len(parts) > 2:
            parts[2] = str(int(parts[2]) + layer_offset)
        return ".".join(parts)

    def slices(self, name: str, layer_offset: int) -> Slices:
        """Return the slices in parameter `name` of a chunk whose first layer is `layer_offset`."""
        slices = self._packed(name, layer_offset).slices(self.rank, self.ranks)
        if (index := self._layer_index(name, layer_offset)) is None:
            return slices
        return tuple(replace(s, tensor=replace(s.tensor, name=f"layers.{index}.{s.tensor.name}")) for s in slices)

    def _packed(self, name: str, layer_offset: int) -> PackedParameter:
        if (index := self._layer_index(name, layer_offset)) is None:
            return self._outer[name]
        _, _, rest = name.removeprefix(_LAYERS).partition(".")
        return self._layers[self.model.layers[index]][rest]

    @staticmethod
    def _layer_index(name: str, layer_offset: int) -> int | None:
        """Return the layer of a chunk's parameter; None: it is outside the layers."""
        if not name.startswith(_LAYERS):
            return None
        return int(name.removeprefix(_LAYERS).partition(".")[0]) + layer_offset
