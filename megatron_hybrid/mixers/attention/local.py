"""Attention without Transformer Engine."""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_hybrid.base.errors import UserError


class ScaledDotProductAttention(torch.nn.Module):
    """Causal attention by torch's SDPA, with the constructor and call of TEDotProductAttention as SelfAttention uses them.

    Args:
        pg_collection: unused. Heads and whole sequences are this rank's, so there is nothing to communicate.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        if config.attention_dropout:
            raise UserError(
                f"attention_dropout: {config.attention_dropout} needs Transformer Engine's attention; set it to 0.0"
            )
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise UserError(
                f"attn_mask_type: {attn_mask_type.name} {attention_type}-attention is not implemented without Transformer Engine; "
                "use causal self-attention"
            )
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
    ) -> torch.Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d].

        Raises:
            UserError: another mask than the causal one.
        """
        if attention_mask is not None or attn_mask_type is not AttnMaskType.causal:
            raise UserError(
                "attention_mask: attention without Transformer Engine is causal and takes no mask; pass None"
            )
        s, b, heads, d = query.shape
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        mask = None
        if self.window is not None and self.window < s:
            at = torch.arange(s, device=q.device)
            behind = at[:, None] - at[None, :]
            mask = (behind >= 0) & (behind < self.window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=k.shape[1] != heads
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)
