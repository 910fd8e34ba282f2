"""The interface of an architecture of transformers.

To add one: a file with a subclass of `Architecture`, and a line in registry.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.convert.hf.fields import Fields, FieldTable
from megatron_hybrid.convert.hf.names import LayerNames, TensorNames
from megatron_hybrid.convert.hf.rope import RopeForms

OLD_LAYER_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}
"""Names in `layer_types` of older files, which transformers still reads, and their present names."""


class Architecture(ABC):
    """A decoder of transformers, in both directions: fields of config.json, and names of tensors."""

    model_type: ClassVar[str]
    """`model_type` in config.json."""
    class_name: ClassVar[str]
    """The only entry of `architectures` in config.json."""
    layer_types: ClassVar[Mapping[str, str]]
    """Entry of `layer_types` in config.json -> symbol in ModelConfig.layer_pattern."""
    fields: ClassVar[FieldTable]
    """Fields of config.json that only this architecture has, and defaults."""
    rope: ClassVar[RopeForms]
    """Forms of rotary embedding in config.json."""
    layers: ClassVar[Mapping[str, LayerNames]]
    """Symbol in ModelConfig.layer_pattern -> names of the layer's tensors."""

    vllm_flags: ClassVar[str] = ""
    """Options without which vLLM computes something else."""

    @abstractmethod
    def unsupported_reason(self, model: ModelConfig) -> str | None:
        """Return why this architecture cannot compute a model, or None if it can."""

    @abstractmethod
    def default_layer_types(self, count: int) -> list[str]:
        """Return the `layer_types` that transformers takes if config.json has none."""

    def read_layer_types(self, fields: Fields, count: int) -> Any:
        """Return the type of each layer as config.json gives it, or transformers' default. The caller checks it."""
        types = fields.config.get("layer_types")
        if isinstance(types, list):
            return [OLD_LAYER_TYPES.get(name, name) if isinstance(name, str) else name for name in types]
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
        return TensorNames(model, self.layers)

    def their_layer_types(self, model: ModelConfig) -> list[str]:
        """Return the model's `layer_types`."""
        names = {symbol: name for name, symbol in self.layer_types.items()}
        return [names[symbol] for symbol in model.layers]
