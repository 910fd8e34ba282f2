"""Self-attention as OLMo 3 and OLMo Hybrid have it: QK norm over whole projections, optional rotary embedding, grouped
queries, optional sliding window. The post-norm is part of the output projection (model/layer_specs.py).
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention

from hybrid_kernels.dispatch import Choice
from hybrid_kernels.qk_norm_rope import explain as explain_qk_norm_rope
from hybrid_kernels.qk_norm_rope import qk_norm_rope
from megatron_hybrid.arch.model import ModelConfig, RopeScalingConfig
from megatron_hybrid.arch.padding import padded_groups
from megatron_hybrid.arch.tensors import attention_tensors
from megatron_hybrid.base.errors import UserError
from megatron_hybrid.distributed.collectives import all_reduce_sum
from megatron_hybrid.distributed.context_parallel import HeadExchange
from megatron_hybrid.mixers.mixer import Mixer
from megatron_hybrid.mixers.tensor_slices import TensorSlices, attention_pieces


class ScaledDotProductAttention(torch.nn.Module):
    """Causal attention by torch's SDPA, with the constructor and call of TEDotProductAttention."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **_):
        super().__init__()
        if config.attention_dropout:
            raise UserError(
                f"attention_dropout: {config.attention_dropout} needs Transformer Engine's attention; set it to 0.0"
            )
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


@dataclass(frozen=True)
class AttentionSizes:
    """True sizes, before tensor parallelism pads them."""

    heads: int
    groups: int
    """Heads of k and v."""
    head_dim: int
    norm_eps: float
    rope_scaling: RopeScalingConfig | None = None
    """YaRN for the layers without a window."""

    @classmethod
    def of(cls, model: ModelConfig) -> "AttentionSizes":
        """Return the sizes of a model of this package."""
        return cls(
            model.num_attention_heads, model.kv_heads, model.attention_head_dim, model.norm_eps, model.rope_scaling
        )

    @classmethod
    def of_megatron(cls, config) -> "AttentionSizes":
        """Return the sizes in a TransformerConfig, which tensor parallelism has to divide."""
        groups = config.num_query_groups or config.num_attention_heads
        return cls(config.num_attention_heads, groups, config.kv_channels, config.layernorm_epsilon)


class SelfAttention(Mixer):
    """The attention mixer of one layer, on this rank's heads.

    `linear_qkv`'s output on a rank is `[q | k | v]`, heads in order. Dummy heads that tensor parallelism adds have zero
    weights (arch/padding.py). Under context parallelism a rank has these of its slice's tokens, and attends with some of them
    over whole sequences (`exchange`).

    The arguments after `submodules` are TransformerLayer's, but for `sizes`. None: those of the TransformerConfig.
    """

    def __init__(
        self,
        config,
        submodules: SelfAttentionSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        sizes: AttentionSizes | None = None,
        cp_comm_type: str | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ):
        super().__init__(config, layer_number, pg_collection)
        tp, hidden = self.tp_group, config.hidden_size
        self.sizes = sizes = sizes or AttentionSizes.of_megatron(config)
        self.head_dim = d = sizes.head_dim
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        scaling = None if windowed else sizes.rope_scaling
        self.rope_is_scaled = scaling is not None
        # YaRN multiplies both q and k, so their products grow by the square
        attention_factor = scaling.effective_attention_factor if scaling else 1.0
        self.groups, self.heads = (count // tp.size() for count in padded_groups(sizes.groups, sizes.heads, tp.size()))
        q_width, kv_width = self.heads * d, self.groups * d
        linear = dict(config=config, bias=False, skip_bias_add=False, is_expert=False, tp_group=tp)
        self.linear_qkv = submodules.linear_qkv(
            hidden,
            (q_width + 2 * kv_width) * tp.size(),
            init_method=config.init_method,
            gather_output=False,
            tp_comm_buffer_name="qkv",
            **linear,
        )
        self.norm = dict(
            head_dim=d,
            true_widths=(sizes.heads * d, sizes.groups * d),
            eps=sizes.norm_eps,
            all_reduce=all_reduce_sum(tp),
        )
        self.q_norm_weight, self.k_norm_weight = self._norm_weight(q_width), self._norm_weight(kv_width)
        self.exchange = HeadExchange(self.cp_group, self.heads, self.groups)
        core_config = copy.copy(config)  # Transformer Engine counts heads by it
        core_config.num_attention_heads = self.exchange.heads * tp.size()
        core_config.num_query_groups = self.exchange.groups * tp.size()
        self.core_arguments = dict(
            config=core_config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            softmax_scale=d**-0.5 * attention_factor**2,
            pg_collection=pg_collection or ProcessGroupCollection.use_mpu_process_groups(),
        )
        self.core_attention = self.another_core_attention(submodules.core_attention)
        self.linear_proj = submodules.linear_proj(
            q_width * tp.size(),
            hidden,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            tp_comm_buffer_name="proj",
            **linear,
        )
        tensors = {
            tensor.name: tensor for tensor in attention_tensors(sizes.heads, sizes.groups, d, hidden, "attention")
        }
        self.pieces, self.pieces_of_first_rank = (
            attention_pieces(TensorSlices(tensors, rank, tp.size()), sizes.heads, sizes.groups, d, "attention")
            for rank in (tp.rank(), 0)
        )
        self.reset_parameters()

    @property
    def has_dummy_heads(self) -> bool:
        return self.heads * self.tp_group.size() != self.sizes.heads

    def another_core_attention(self, kind: type) -> torch.nn.Module:
        """One more attention of this layer's sizes."""
        return kind(**self.core_arguments)

    def _norm_weight(self, width: int) -> torch.nn.Parameter:
        weight = self.new_parameter(width)  # sharded, so that the gradient norm counts every rank's part
        torch.nn.init.ones_(weight)
        return weight

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inference_context=None,
        rotary_pos_emb: torch.Tensor | None = None,
        rotary_pos_cos=None,
        rotary_pos_sin=None,
        rotary_pos_cos_sin=None,
        attention_bias=None,
        packed_seq_params=None,
        sequence_len_offset=None,
        *,
        inference_params=None,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [s, b, h] (this rank's tokens under sequence and context parallelism) -> ([s, b, h], None).

        Args:
            rotary_pos_emb: angles [s, 1, 1, head_dim] of this rank's tokens, or [2, s, 1, 1, head_dim]: plain and scaled.
                None: no rotary embedding.

        Raises:
            UserError: any other input than these and the causal mask.
        """
        self.check_mask(attention_mask)
        self.refuse(
            inference_context=inference_context,
            inference_params=inference_params,
            rotary_pos_cos=rotary_pos_cos,
            rotary_pos_sin=rotary_pos_sin,
            rotary_pos_cos_sin=rotary_pos_cos_sin,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
            sequence_len_offset=sequence_len_offset,
        )
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
