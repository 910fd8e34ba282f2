"""Embedding with a scale and a norm behind it.

Suffixes of tensor names: s tokens of this rank, b sequences, h hidden size.
"""

from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding

from megatron_hybrid.arch.model_fields import ModelFields


class ScaledEmbedding(LanguageModelEmbedding):
    """megatron-core's embedding, whose result is multiplied by `scale` and then normalised by `norm`.

    Under sequence parallelism both see this rank's tokens only. The norm's weight is marked as the layers' norms are, so its
    gradient is summed over the tensor parallel ranks.
    """

    scale: float
    norm: torch.nn.Module | None

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Embed tokens [b, s] and return [s, b, h]. The arguments are megatron-core's."""
        x_sbh: torch.Tensor = super().forward(*args, **kwargs)
        if self.scale != 1:
            x_sbh = x_sbh * self.scale
        return x_sbh if self.norm is None else self.norm(x_sbh)


def scale_and_normalise(embedding: LanguageModelEmbedding, model: ModelFields, norm: Any) -> None:
    """Make `embedding` a ScaledEmbedding if the model has a scale or a norm for it.

    megatron-core's model has no slot for the embedding's class, so an embedding that was built is changed.

    Args:
        norm: constructor of the backend's norm.
    """
    if model.embed_scale == 1 and not model.embedding_norm:
        return
    embedding.__class__ = ScaledEmbedding
    embedding.scale, config = model.embed_scale, embedding.config
    made = norm(config=config, hidden_size=model.hidden_size, eps=model.norm_eps) if model.embedding_norm else None
    embedding.norm = made
