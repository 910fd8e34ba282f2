"""Transformer Engine's attention, for sequences with documents too."""

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from megatron_hybrid.mixers.documents import Documents


class TransformerEngineAttention(TEDotProductAttention):
    """megatron-core's TEDotProductAttention, which takes documents as the THD layout: the tokens of all documents in one row."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType,
        documents: Documents | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d].

        Args:
            documents: of whole sequences. Their tokens do not see each other.
            options: further options of TEDotProductAttention.
        """
        masks = dict(attention_mask=attention_mask, attn_mask_type=attn_mask_type)
        if documents is None:
            return super().forward(query, key, value, **masks, **options)
        s, b = query.shape[:2]
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        out = super().forward(q, k, v, **masks, packed_seq_params=packed_seq_params(documents), **options)
        return out.view(b, s, -1).transpose(0, 1).contiguous()


def packed_seq_params(documents: Documents) -> PackedSeqParams:
    """Return Transformer Engine's arguments for documents that follow each other without padding.

    `pad_between_seqs` is given and padded boundaries are not: otherwise Transformer Engine excludes FlashAttention 2. It derives a
    missing `max_seqlen` from the boundaries, with a host synchronization, so a bound is given.
    """
    bounds, longest = documents.cu_seqlens, documents.longest
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        pad_between_seqs=False,
    )
