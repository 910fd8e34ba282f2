"""The architectures of transformers that can be converted."""

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf.base import Architecture
from megatron_hybrid.convert.hf.olmo3 import Olmo3
from megatron_hybrid.convert.hf.olmo_hybrid import OlmoHybrid
from megatron_hybrid.convert.hf.olmo_hybrid_small import OlmoHybridSmall
from megatron_hybrid.convert.hf.qwen3_5 import Qwen35, Qwen35Text

ARCHITECTURES: dict[str, Architecture] = {
    found.model_type: found for found in (OlmoHybrid(), Olmo3(), Qwen35Text(), Qwen35(), OlmoHybridSmall())
}
"""Architecture by model_type. If several can compute a model, an export is of the one it was converted from, or of the first."""


def find_architecture(model_type: object) -> Architecture:
    """Return the architecture that a config.json names.

    Raises:
        ConversionError: there is none.
    """
    found = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        raise ConversionError(f"config.json: model_type {model_type!r:.100} is not one of {', '.join(ARCHITECTURES)}")
    return found


def architecture_for(model: ModelConfig, preferred: object = None) -> Architecture:
    """Return the architecture that computes a model.

    Args:
        preferred: the model_type to choose if several do.

    Raises:
        ConversionError: there is none. Gives the reason for each architecture.
    """
    reasons = {}
    for architecture in sorted(ARCHITECTURES.values(), key=lambda one: one.model_type != preferred):
        reason = architecture.unsupported_reason(model) or architecture.other_block_reason(model)
        if reason is None:
            return architecture
        reasons[architecture.model_type] = reason
    told = "; ".join(f"{model_type}: {reason}" for model_type, reason in reasons.items())
    raise ConversionError(f"no model class of transformers computes this model, so it cannot be exported. {told}")
