"""The architectures of transformers that can be converted."""

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import default_blocks
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf.base import Architecture
from megatron_hybrid.convert.hf.olmo3 import Olmo3
from megatron_hybrid.convert.hf.olmo_hybrid import OlmoHybrid

ARCHITECTURES: dict[str, Architecture] = {found.model_type: found for found in (OlmoHybrid(), Olmo3())}
"""Architecture by model_type. If several can compute a model, an export is of the first."""


def find_architecture(model_type: object) -> Architecture:
    """Return the architecture that a config.json names.

    Raises:
        ConversionError: there is none.
    """
    found = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        raise ConversionError(f"config.json: model_type {model_type!r:.100} is not one of {', '.join(ARCHITECTURES)}")
    return found


def architecture_for(model: ModelConfig) -> Architecture:
    """Return the architecture that computes a model.

    Raises:
        ConversionError: there is none. Gives the reason for each architecture.
    """
    if changed := [
        symbol for symbol in model.blocks_by_symbol if symbol in model.blocks and not _is_default(model, symbol)
    ]:
        raise ConversionError(
            f"model.blocks.{changed[0]}: it is no block of an architecture of transformers, so the model cannot be exported"
        )
    reasons = {}
    for architecture in ARCHITECTURES.values():
        reason = architecture.unsupported_reason(model)
        if reason is None:
            return architecture
        reasons[architecture.model_type] = reason
    told = "; ".join(f"{model_type}: {reason}" for model_type, reason in reasons.items())
    raise ConversionError(f"no model class of transformers computes this model, so it cannot be exported. {told}")


def huggingface_name(model: ModelConfig, tensor: str) -> str:
    """Return the name of a true tensor in the export of a model."""
    return architecture_for(model).names(model).theirs(tensor)


def _is_default(model: ModelConfig, symbol: str) -> bool:
    """Return whether the model's block computes what the block of that symbol does by default."""
    default = default_blocks().get(symbol)
    return default is not None and model.known_blocks[symbol] == default.model_copy(
        update={"title": model.known_blocks[symbol].title}
    )
