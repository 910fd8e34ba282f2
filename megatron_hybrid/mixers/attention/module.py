"""Self-attention: QK norm over whole projections or each head, optional rotary embedding of all or some channels, grouped
queries, optional sliding window, optional output gate.

Suffixes of tensor names: s tokens of this rank, b sequences, h hidden size, w channels of this rank, n heads, d channels of a head.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from hybrid_kernels.dispatch import Choice
from hybrid_kernels.sigmoid_gate import explain as explain_sigmoid_gate
from hybrid_kernels.sigmoid_gate import sigmoid_gate
from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.model_fields import ModelFields
from megatron_hybrid.base.errors import UserError
from megatron_hybrid.distributed.context_parallel import HeadExchange
from megatron_hybrid.distributed.device import local_device
from megatron_hybrid.mixers.attention.local import ScaledDotProductAttention
from megatron_hybrid.mixers.attention.megatron_config import concentration_factor, sizes_of_megatron, turns_by_position
from megatron_hybrid.mixers.attention.query_key_norm import QueryKeyNorm
from megatron_hybrid.mixers.attention.sizes import AttentionSizes
from megatron_hybrid.mixers.attention.spec import parameters
from megatron_hybrid.mixers.backend import Backend, Linears
from megatron_hybrid.mixers.documents import Documents
from megatron_hybrid.mixers.formats import FormatQuery
from megatron_hybrid.mixers.mixer import Mixer
from megatron_hybrid.precision.attention_probe import probe_attention


@dataclass
class SelfAttentionSubmodules:
    """Parts of SelfAttention: a column-parallel linear, attention, and a row-parallel linear, with their norms."""

    linear_qkv: type
    core_attention: type
    linear_proj: type


def module_spec(model: ModelFields, block: Block, backend: Backend, linears: Linears) -> ModuleSpec:
    """Return the spec of a model's mixer. Which layers have a window is part of the TransformerConfig."""
    return mixer_module_spec(AttentionSizes.of(model, block), backend, linears)


def mixer_module_spec(sizes: AttentionSizes | None, backend: Backend, linears: Linears) -> ModuleSpec:
    """Return the spec of a mixer in any megatron-core model. None: of the sizes in its TransformerConfig."""
    submodules = SelfAttentionSubmodules(
        linear_qkv=linears.input, core_attention=backend.attention, linear_proj=linears.output
    )
    return ModuleSpec(module=SelfAttention, params=dict(sizes=sizes), submodules=submodules)


class SelfAttention(Mixer):
    """The attention mixer of one layer, on this rank's heads.

    `linear_qkv`'s output on a rank is `[q | k | v | gate]`, heads in order. Under context parallelism a rank has these of its slice's
    tokens, and attends with some of the heads over whole sequences (`exchange`).

    The arguments after `submodules` are TransformerLayer's, except for `sizes`. None: those of the TransformerConfig.
    """

    uses_rotary_embedding = True
    obeys_documents = True

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        sizes: AttentionSizes | None = None,
        cp_comm_type: str | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None:
        is_of_megatron = sizes is None
        sizes = sizes or sizes_of_megatron(config)
        super().__init__(config, layer_number, pg_collection, parameters(sizes, config.hidden_size))
        self.sizes, self.head_dim = sizes, sizes.head_dim
        self.uses_rotary_embedding = not is_of_megatron or turns_by_position(config, layer_number)
        self.query_factor = concentration_factor(config) ** 2 if is_of_megatron else 1.0
        tp, d = self.tp_group, sizes.head_dim
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        scaling = None if windowed else sizes.rope_scaling
        self.rope_is_scaled = scaling is not None
        # YaRN multiplies both q and k, so their products grow by the square
        attention_factor = scaling.effective_attention_factor if scaling else 1.0
        q_width, kv_width, *_ = widths = self.packing["linear_qkv.weight"].rank_sizes(tp.size())
        self.heads, self.groups = q_width // d, kv_width // d
        linear = dict(config=config, bias=False, skip_bias_add=False, is_expert=False, tp_group=tp)
        self.linear_qkv = submodules.linear_qkv(
            config.hidden_size,
            sum(widths) * tp.size(),
            init_method=config.init_method,
            gather_output=False,
            tp_comm_buffer_name="qkv",
            **linear,
        )
        self.q_norm_weight = self.new_parameter("q_norm_weight")
        self.k_norm_weight = self.new_parameter("k_norm_weight")
        self.norm = QueryKeyNorm(sizes, self.heads, self.groups, tp, config.sequence_parallel)
        self.norm.mark(self.q_norm_weight, self.k_norm_weight)
        self.exchange = HeadExchange(self.cp_group, self.heads, self.groups)
        core_config = copy.copy(config)  # Transformer Engine counts heads by it
        core_config.num_attention_heads = self.exchange.heads * tp.size()
        core_config.num_query_groups = self.exchange.groups * tp.size()
        self.core_arguments: dict[str, Any] = dict(
            config=core_config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            softmax_scale=(is_of_megatron and config.softmax_scale or d**-0.5) * attention_factor**2,
            pg_collection=pg_collection or ProcessGroupCollection.use_mpu_process_groups(),
        )
        self.core_attention = self.another_core_attention(submodules.core_attention)
        self.linear_proj = submodules.linear_proj(
            q_width * tp.size(),
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            tp_comm_buffer_name="proj",
            **linear,
        )
        self.finish()

    def another_core_attention(self, kind: type) -> torch.nn.Module:
        """Return another attention of this layer's sizes."""
        attention: torch.nn.Module = kind(**self.core_arguments)
        return attention

    def mix(
        self, hidden_states: torch.Tensor, rotary_pos_emb: torch.Tensor | None, documents: Documents | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            rotary_pos_emb: [s, 1 or b, 1, d], or [2, s, 1 or b, 1, d]: plain and scaled angles of the channels that are turned;
                None: no rotation.
        """
        packed_sbw, _ = self.linear_qkv(hidden_states)
        q, k, v, gate_sbw = self.split(packed_sbw, rotary_pos_emb)
        if self.query_factor != 1.0 and rotary_pos_emb is not None:
            q = q * self.query_factor
        q, k, v = (
            self.exchange.to_heads(x, n)
            for x, n in ((q, self.exchange.heads), (k, self.exchange.groups), (v, self.exchange.groups))
        )
        context = self.core_attention(
            q, k, v, attention_mask=None, attn_mask_type=AttnMaskType.causal, documents=documents
        )
        return self.project(self.exchange.to_tokens(context), gate_sbw), None

    def split(
        self, packed_sbw: torch.Tensor, rotary_pos_emb: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return normalised and rotated q and k, and v, [s, b, n, d], and the output gate, [s, b, w], or None without one."""
        return self.norm(packed_sbw, self.q_norm_weight, self.k_norm_weight, self.own_angles(rotary_pos_emb))

    def project(self, context_sbw: torch.Tensor, gate_sbw: torch.Tensor | None) -> torch.Tensor:
        """Apply the output gate and the output projection."""
        if gate_sbw is not None:
            context_sbw = sigmoid_gate(context_sbw, gate_sbw)
        y_sbh: torch.Tensor = self.linear_proj(context_sbw)[0]
        return y_sbh

    def own_angles(self, rotary_pos_emb: torch.Tensor | None) -> torch.Tensor | None:
        """Return this layer's angles: the plain or the scaled ones, if there are both.

        Raises:
            UserError: angles of some channels, where the norm of whole projections turns all of them.
        """
        turned = self.head_dim if rotary_pos_emb is None else rotary_pos_emb.shape[-1]
        if turned != self.head_dim and self.sizes.qk_norm == "projection":
            raise UserError(
                f"rotary_percent: rotary_pos_emb has angles of {turned} of {self.head_dim} channels of a head, and this "
                "attention turns all of them; set it to 1.0"
            )
        if rotary_pos_emb is None or rotary_pos_emb.dim() != 5:
            return rotary_pos_emb
        return rotary_pos_emb[int(self.rope_is_scaled)]

    def backends(self, sequence_length: int, batch_size: int, documents: bool = False) -> list[Choice]:
        q_width, kv_width = self.heads * self.head_dim, self.groups * self.head_dim
        gate_width = q_width if self.sizes.output_gate else 0
        packed = self.q_norm_weight.detach()[:1].expand(
            sequence_length, batch_size, q_width + 2 * kv_width + gate_width
        )
        found = [self.norm.explain(packed, self.q_norm_weight, self.k_norm_weight)]  # expanded: no memory
        if gate_width:
            found.append(explain_sigmoid_gate(packed[..., :q_width], packed[..., -q_width:]))
        return found

    def formats(self, query: FormatQuery) -> list[tuple[str, str, str, str]]:
        return [*super().formats(query), ("attention", *self._attention_format(query))]

    def _attention_format(self, query: FormatQuery) -> tuple[str, str, str]:
        """Return (format, backend, reason) of attention itself. With Transformer Engine it is run once to find out."""
        exchange, backend, reason = self.exchange, query.backend, query.reason
        if exchange.ranks > 1:
            reason += f"; {exchange.heads} heads of whole sequences on each of {exchange.ranks} context parallel ranks"
        if backend.attention is ScaledDotProductAttention:
            masked = "; a mask per block of queries keeps documents apart" if query.documents else ""
            return query.dtype, "torch's scaled_dot_product_attention", reason + masked
        if query.documents:
            reason += "; documents in THD layout"
        sizes = (query.sequence_length, query.batch_size, exchange.heads, exchange.groups, self.head_dim)
        documents = Documents.of_equal_length(*sizes[:2], local_device()) if query.documents else None
        fp8 = self.another_core_attention(backend.attention) if query.fp8_attention else None
        with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
            found = probe_attention(fp8, self.another_core_attention(backend.plain_attention), *sizes, documents)
        if fp8 is None:
            return query.dtype, found.backend, reason
        error = f"differs from {query.dtype} by {found.error:.2g}, as it should"
        return "fp8, delayed scaling", found.backend, f"precision.fp8_attention = true; {error}"
