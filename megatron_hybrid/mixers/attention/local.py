"""Attention without Transformer Engine.

Suffixes of tensor names: b sequences, h heads, s tokens, d channels of a head.
"""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.utils.checkpoint import checkpoint

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.mixers.documents import Documents

MASK_ENTRIES = 2**26
"""Most entries of a mask of documents at a time. SDPA keeps masks in the dtype of the scores: these are 256 MiB in fp32."""


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
        documents: Documents | None = None,
    ) -> torch.Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d].

        Args:
            documents: of whole sequences. Their tokens do not see each other.

        Raises:
            UserError: another mask than the causal one.
        """
        if attention_mask is not None or attn_mask_type is not AttnMaskType.causal:
            raise UserError(
                "attention_mask: attention without Transformer Engine is causal and takes no mask; pass None"
            )
        s, b, heads, d = query.shape
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if documents is None:
            out = self._attend(q, k, v)
        else:
            out = attend_in_documents(q, k, v, documents.starts_bs, self.window, self.scale)
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s, mask = q.shape[2], None
        if self.window is not None and self.window < s:
            at = torch.arange(s, device=q.device)
            behind = at[:, None] - at[None, :]
            mask = (behind >= 0) & (behind < self.window)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=k.shape[1] != q.shape[1]
        )


def attend_in_documents(
    q_bhsd: torch.Tensor,
    k_bhsd: torch.Tensor,
    v_bhsd: torch.Tensor,
    starts_bs: torch.Tensor,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Return causal attention inside documents, [b, h, s, d]. Long sequences attend in blocks of queries, so that masks stay small.

    Args:
        k_bhsd, v_bhsd: h divides that of q.
        starts_bs: index in its sequence of the first token of each token's document.
        window: tokens that a token sees, itself included; None: all of its document.
    """
    if k_bhsd.shape[1] != q_bhsd.shape[1]:  # SDPA's memory-efficient kernel does not take grouped queries
        repeats = q_bhsd.shape[1] // k_bhsd.shape[1]
        k_bhsd, v_bhsd = (x.repeat_interleave(repeats, 1) for x in (k_bhsd, v_bhsd))
    b, s = starts_bs.shape
    rows = max(1, MASK_ENTRIES // (b * s))
    run = partial(_attend_block, window=window, scale=scale)
    if rows >= s:
        return run(q_bhsd, k_bhsd, v_bhsd, starts_bs, 0)
    blocks = [
        checkpoint(run, q, k_bhsd, v_bhsd, starts, i * rows, use_reentrant=False, preserve_rng_state=False)
        for i, (q, starts) in enumerate(zip(q_bhsd.split(rows, 2), starts_bs.split(rows, 1), strict=True))
    ]
    return torch.cat(blocks, 2)


def _attend_block(
    q_bhsd: torch.Tensor,
    k_bhsd: torch.Tensor,
    v_bhsd: torch.Tensor,
    starts_bs: torch.Tensor,
    first: int,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Return the attention of the queries from token `first` on, whose documents are `starts_bs`."""
    last = first + q_bhsd.shape[2]
    keys = slice(0 if window is None else max(0, first - window + 1), last)
    places = torch.arange(last, dtype=starts_bs.dtype, device=starts_bs.device)
    queries, seen_from = places[first:], starts_bs
    if window is not None:
        seen_from = torch.maximum(starts_bs, queries - window + 1)
    mask = (places[keys] <= queries[:, None]) & (places[keys] >= seen_from[..., None])
    return F.scaled_dot_product_attention(
        q_bhsd, k_bhsd[:, :, keys], v_bhsd[:, :, keys], attn_mask=mask[:, None], scale=scale
    )
