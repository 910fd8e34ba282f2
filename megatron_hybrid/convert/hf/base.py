"""The interface of an architecture of transformers.

To add one: a file with a subclass of `Architecture`, and a line in registry.py.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megatron_hybrid.arch.blocks import Blocks
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import default_blocks
from megatron_hybrid.convert.hf.fields import Fields, FieldTable
from megatron_hybrid.convert.hf.names import PREFIX, LayerNames, TensorNames
from megatron_hybrid.convert.hf.rope import RopeForms


class Architecture(ABC):
    """A decoder of transformers, in both directions: fields of config.json, and names of tensors."""

    model_type: ClassVar[str]
    """`model_type` in config.json."""
    class_name: ClassVar[str]
    """The only entry of `architectures` in config.json."""
    layer_types: ClassVar[Mapping[str, str]]
    """Entry of `layer_types` in config.json -> symbol in ModelConfig.layer_pattern."""
    old_layer_types: ClassVar[Mapping[str, str]] = {}
    """Entries of older files, which transformers still reads -> present entries."""
    fields: ClassVar[FieldTable]
    """Fields of config.json that only this architecture has, and defaults."""
    rope: ClassVar[RopeForms]
    """Forms of rotary embedding in config.json."""
    layers: ClassVar[Mapping[str, LayerNames]]
    """Symbol in ModelConfig.layer_pattern -> names of the layer's tensors."""

    prefix: ClassVar[str] = PREFIX
    """Prefix of its tensors' names, except for the output matrix."""
    other_prefixes: ClassVar[tuple[str, ...]] = ()
    """Further prefixes that files may have."""
    kept_tensors: ClassVar[re.Pattern[str] | None] = None
    """Names of tensors that are no part of the language model. A checkpoint keeps them, and an export has them unchanged."""
    zero_centered_norm: ClassVar[bool] = False
    """Its norms multiply by 1 + weight."""
    embedding_norm: ClassVar[bool] = False
    """Its embeddings are multiplied by embed_scale and normalised."""

    vllm_flags: ClassVar[str] = ""
    """Options without which vLLM computes something else."""

    @abstractmethod
    def unsupported_reason(self, model: ModelConfig) -> str | None:
        """Return why this architecture cannot compute a model, or None if it can."""

    def blocks(self, model: ModelConfig) -> Blocks:
        """Return the block that it computes for each symbol of `layers`; by default those that mixers bring."""
        return {symbol: block for symbol, block in default_blocks().items() if symbol in self.layers}

    def other_block_reason(self, model: ModelConfig) -> str | None:
        """Return which block, norm or embedding of a model is not this architecture's, or None if all are."""
        blocks = self.blocks(model)
        for symbol, block in model.blocks_by_symbol.items():
            mine = blocks.get(symbol)
            if mine is not None and block != mine.model_copy(update={"title": block.title}):
                return f"model.blocks.{symbol} is not the block of this class"
        if model.zero_centered_norm != self.zero_centered_norm:
            return f"model.zero_centered_norm is {str(model.zero_centered_norm).lower()}, and this class has the other kind of norms"
        if model.embedding_norm != self.embedding_norm:
            return (
                f"model.embedding_norm is {str(model.embedding_norm).lower()}, and this class has {self._embedding()}"
            )
        if model.embed_scale != 1 and not self.embedding_norm:
            return f"model.embed_scale is {model.embed_scale:g}, and this class has {self._embedding()}"
        return None

    def _embedding(self) -> str:
        return "scaled and normalised embeddings" if self.embedding_norm else "plain embeddings"

    def keeps(self, tensor: str) -> bool:
        """Return whether a tensor of a file is kept for exports."""
        return self.kept_tensors is not None and self.kept_tensors.fullmatch(tensor) is not None

    def language_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of config.json that describe the language model, all on one level.

        Raises:
            ConversionError: fields around it that are unknown or contradict it.
        """
        return config

    def whole_config(self, config: dict[str, Any], origin: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config.json of an export.

        Args:
            config: the language model's fields.
            origin: the config.json that the model was converted from.
        """
        return config

    @abstractmethod
    def default_layer_types(self, count: int) -> list[str]:
        """Return the `layer_types` that transformers takes if config.json has none."""

    def read_layer_types(self, fields: Fields, count: int) -> Any:
        """Return the type of each layer as config.json gives it, or transformers' default. The caller checks it."""
        types = fields.config.get("layer_types")
        if isinstance(types, list):
            return [self.old_layer_types.get(name, name) if isinstance(name, str) else name for name in types]
        return self.default_layer_types(count) if types is None else types

    @abstractmethod
    def read(self, fields: Fields, layer_types: Sequence[str]) -> dict[str, Any]:
        """Return the fields of ModelConfig that only this architecture has. Problems are added to `fields`."""

    @abstractmethod
    def write(self, model: ModelConfig, positions: int) -> dict[str, Any]:
        """Return the fields of config.json that only this architecture has.

        Args:
            positions: max_position_embeddings.
        """

    def card_rows(self, model: ModelConfig) -> dict[str, str]:
        """Return rows for the model card's table."""
        return {}

    def export_notes(self, model: ModelConfig) -> list[str]:
        """Return notes for users who export a model: versions of transformers that compute something else."""
        return []

    def names(self, model: ModelConfig) -> TensorNames:
        """Return the names of a model's tensors."""
        return TensorNames(model, self.layers, self.prefix, self.other_prefixes)

    def their_layer_types(self, model: ModelConfig) -> list[str]:
        """Return the model's `layer_types`."""
        names = {symbol: name for name, symbol in self.layer_types.items()}
        return [names[symbol] for symbol in model.layers]
