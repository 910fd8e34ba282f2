"""Self-attention as OLMo 3 and OLMo Hybrid have it: QK norm over whole projections, optional rotary embedding, grouped
queries, optional sliding window. The post-norm is part of the output projection (model/layer_specs.py).
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention

from hybrid_kernels.dispatch import Choice
from hybrid_kernels.qk_norm_rope import explain as explain_qk_norm_rope
from hybrid_kernels.qk_norm_rope import qk_norm_rope
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.padding import PaddedSizes
from megatron_hybrid.parallel.context import HeadExchange


class ScaledDotProductAttention(torch.nn.Module):
    """Causal attention by torch's SDPA, with the constructor and call of TEDotProductAttention."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **_):
        super().__init__()
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None
        self.scale = softmax_scale

    def forward(self, query, key, value, attention_mask=None, attn_mask_type=None, packed_seq_params=None, **_):
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d]."""
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


@dataclass
class SelfAttentionSubmodules:
    """Parts of SelfAttention: a column-parallel linear (with the pre-norm or not), attention, a row-parallel linear."""

    linear_qkv: type
    core_attention: type
    linear_proj: type


class SelfAttention(MegatronModule):
    """The attention mixer of one layer, on this rank's heads.

    `linear_qkv`'s output on a rank is `[q | k | v]`, heads in order. Dummy heads that tensor parallelism adds have zero
    weights (config/padding.py). Under context parallelism a rank has these of its slice's tokens, and attends with some of them
    over whole sequences (`exchange`).
    """

    def __init__(self, config, submodules, layer_number, pg_collection, model: ModelConfig, name=None, **_):
        super().__init__(config)
        tp = pg_collection.tp
        sizes, d, hidden = PaddedSizes.of(model, tp.size()), model.attention_head_dim, model.hidden_size
        self.head_dim = d
        scaling = model.rope_scaling if model.layers[layer_number - 1] == "A" else None
        self.rope_is_scaled = scaling is not None
        # YaRN multiplies q and k alike: their products grow by the square
        attention_factor = scaling.effective_attention_factor if scaling else 1.0
        self.heads, self.groups = sizes.num_attention_heads // tp.size(), sizes.num_key_value_heads // tp.size()
        q_width, kv_width = self.heads * d, self.groups * d
        linear = dict(
            config=config, init_method=config.init_method, bias=False, skip_bias_add=False, is_expert=False, tp_group=tp
        )
        self.linear_qkv = submodules.linear_qkv(
            hidden, (q_width + 2 * kv_width) * tp.size(), gather_output=False, tp_comm_buffer_name="qkv", **linear
        )
        self.norm = dict(
            head_dim=d,
            true_widths=(model.num_attention_heads * d, model.kv_heads * d),
            eps=model.norm_eps,
            group=tp if tp.size() > 1 else None,
        )
        self.q_norm_weight, self.k_norm_weight = self._norm_weight(q_width), self._norm_weight(kv_width)
        self.exchange = HeadExchange(pg_collection.cp, self.heads, self.groups)
        core_config = copy.copy(config)  # Transformer Engine counts heads by it
        core_config.num_attention_heads = self.exchange.heads * tp.size()
        core_config.num_query_groups = self.exchange.groups * tp.size()
        self.core_arguments = dict(
            config=core_config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            softmax_scale=d**-0.5 * attention_factor**2,
            pg_collection=pg_collection,
        )
        self.core_attention = self.another_core_attention(submodules.core_attention)
        self.linear_proj = submodules.linear_proj(
            q_width * tp.size(), hidden, input_is_parallel=True, tp_comm_buffer_name="proj", **linear
        )

    def another_core_attention(self, kind: type) -> torch.nn.Module:
        """One more attention of this layer's sizes."""
        return kind(**self.core_arguments)

    def _norm_weight(self, width: int) -> torch.nn.Parameter:
        ones = torch.ones(width, device=torch.cuda.current_device(), dtype=self.config.params_dtype)
        weight = torch.nn.Parameter(ones)
        set_tensor_model_parallel_attributes(weight, True, 0, 1)  # so that the gradient norm counts every rank's part
        return weight

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, rotary_pos_emb=None, **_):
        """hidden_states [s, b, h] (this rank's tokens under sequence and context parallelism) -> ([s, b, h], None).

        rotary_pos_emb: angles [s, 1, 1, d], or [2, s, 1, 1, d]: plain and scaled. None: no rotary embedding.
        """
        qkv, _ = self.linear_qkv(hidden_states)
        angles = rotary_pos_emb
        if angles is not None and angles.dim() == 5:
            angles = angles[int(self.rope_is_scaled)]
        q, k, v = qk_norm_rope(qkv, self.q_norm_weight, self.k_norm_weight, angles, **self.norm)
        q, k, v = (
            self.exchange.to_heads(x, n)
            for x, n in ((q, self.exchange.heads), (k, self.exchange.groups), (v, self.exchange.groups))
        )
        context = self.core_attention(q, k, v, attention_mask=None, attn_mask_type=AttnMaskType.causal)
        return self.linear_proj(self.exchange.to_tokens(context))

    def backends(self, sequence_length: int, batch_size: int) -> list[Choice]:
        """Which backend QK norm and rotary embedding run, and why."""
        width = len(self.q_norm_weight) + 2 * len(self.k_norm_weight)
        qkv = self.q_norm_weight.detach()[:1].expand(sequence_length, batch_size, width)  # no memory
        return [explain_qk_norm_rope(qkv, self.q_norm_weight, self.k_norm_weight)]
