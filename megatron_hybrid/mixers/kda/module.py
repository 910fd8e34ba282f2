"""The Kimi Delta Attention mixer (arXiv 2510.26692) with tensor, sequence and context parallelism.

    project  ->  conv, beta  ->  decay and gate  ->  KDA rule  ->  gated norm  ->  project

Tensor parallel ranks share the heads: each rank's slice of every weight is whole heads. The low-rank projections of the decay (f)
and of the output gate (g) have no heads in between: ranks share their channels, and gather them. Context parallel ranks share the
tokens, and pass on states and the inputs that the convolution looks back on. The mathematics is in `hybrid_kernels`, whose
dispatch chooses the backend.

Shapes: s tokens of this rank, b sequences, h hidden size, w width of in_proj's output on this rank, l low-rank channels, k and v
channels of a head's keys and values.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    copy_to_tensor_model_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from hybrid_kernels.conv_gates import conv_gates
from hybrid_kernels.conv_gates import explain as explain_conv_gates
from hybrid_kernels.dispatch import Choice
from hybrid_kernels.gated_rmsnorm import explain as explain_gated_rmsnorm
from hybrid_kernels.gated_rmsnorm import gated_rmsnorm
from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.model_fields import ModelFields
from megatron_hybrid.distributed.context_parallel import with_halo
from megatron_hybrid.mixers.backend import Backend, Linears
from megatron_hybrid.mixers.documents import Documents
from megatron_hybrid.mixers.kda.config import KimiDeltaAttentionConfig
from megatron_hybrid.mixers.kda.slices import explain_kda_rule_of_slices, kda_rule_of_slices
from megatron_hybrid.mixers.kda.spec import parameters, sizes
from megatron_hybrid.mixers.linears import build_linears, recomputes_between_linears
from megatron_hybrid.mixers.mixer import Mixer
from megatron_hybrid.mixers.recompute import between_linears


@dataclass
class KimiDeltaAttentionSubmodules:
    """Parts of KimiDeltaAttention: a column-parallel linear, with the pre-norm or not, and a row-parallel one."""

    in_proj: type
    out_proj: type


def module_spec(model: ModelFields, block: Block, backend: Backend, linears: Linears) -> ModuleSpec:
    """Return the spec of a model's mixer."""
    submodules = KimiDeltaAttentionSubmodules(in_proj=linears.input, out_proj=linears.output)
    return ModuleSpec(module=KimiDeltaAttention, params=dict(kda=sizes(model)), submodules=submodules)


class KimiDeltaAttention(Mixer):
    """The Kimi Delta Attention mixer of one layer, on this rank's heads.

    Args:
        kda: its sizes.
        cp_comm_type, pp_layer_offset, name: unused; TransformerLayer passes them to every attention module.
    """

    obeys_documents = True

    def __init__(
        self,
        config: TransformerConfig,
        submodules: KimiDeltaAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        kda: KimiDeltaAttentionConfig,
        cp_comm_type: str | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config, layer_number, pg_collection, parameters(kda, config.hidden_size))
        self.kda, ranks = kda, self.tp_group.size()
        packed = self.packing["in_proj.weight"]
        _, _, self.v_width, self.low_rank, _, self.heads = packed.rank_sizes(ranks)
        self.packed_width = packed.rank_shape(ranks)[0]
        self.recompute = recomputes_between_linears(config)
        self.in_proj, self.out_proj = build_linears(submodules, config, self.tp_group, self.packed_width, self.v_width)
        self.conv_weight = self.new_parameter("conv_weight")
        self.f_b_weight, self.g_b_weight = self.new_parameter("f_b_weight"), self.new_parameter("g_b_weight")
        self.A_log, self.dt_bias = self.new_parameter("A_log"), self.new_parameter("dt_bias")
        self.o_norm_weight = self.new_parameter("o_norm_weight")
        # it serves every rank's heads: its gradient is summed over the ranks, once per step together with the other norms'
        self.o_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.finish()

    def mix(
        self, hidden_states: torch.Tensor, rotary_pos_emb: torch.Tensor | None, documents: Documents | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Project, convolve, apply the KDA rule and its norm, and project back. Angles are for attention layers."""
        packed, _ = self.in_proj(hidden_states)
        between = partial(self._between_projections, documents=documents)
        return between_linears(between, packed, self.out_proj, self.recompute and self.training)

    def _between_projections(self, packed_sbw: torch.Tensor, documents: Documents | None) -> torch.Tensor:
        of_documents: dict[str, Any] = {}
        if documents:
            of_documents = dict(positions_bs=documents.positions_bs, cu_seqlens=documents.cu_seqlens)
        packed_sbw, halo_sbw = with_halo(packed_sbw, self.kda.conv_kernel_size - 1, self.cp_group)
        q, k, v, beta, low = self.convolve(packed_sbw, halo_sbw, of_documents.get("positions_bs"))
        raw, gate = self.decay_and_gate(low)
        o = kda_rule_of_slices(q, k, v, raw, beta, group=self.cp_group, **of_documents, **self.gate_arguments())
        weight = self.o_norm_weight
        if not self.config.sequence_parallel:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
        return gated_rmsnorm(o, gate, weight, self.kda.norm_eps, activation="sigmoid")

    def convolve(
        self, packed_sbw: torch.Tensor, halo_sbw: torch.Tensor | None, positions_bs: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Return q, k [b, s, heads, k], v [b, s, heads, v], beta [b, s, heads], and this rank's low-rank channels [s, b, l]."""
        return conv_gates(
            packed_sbw,
            self.conv_weight,
            None,
            None,
            **self.kernel_sizes(),
            allow_negative_eigenvalues=self.kda.allow_negative_eigenvalues,
            halo_sbw=halo_sbw,
            positions_bs=positions_bs,
            return_gate=True,
        )

    def decay_and_gate(self, low_sbl: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the projection of the decay [b, s, heads, k], and the output gate [s, b, heads * v], of this rank's heads."""
        ranks = self.tp_group.size()
        if ranks > 1:
            low_sbl = all_gather_last_dim_from_tensor_parallel_region(low_sbl, group=self.tp_group)
        # every rank has as many channels of f as of g, and those after the last true one are padding
        f, g = (x.flatten(2)[..., : self.kda.rank] for x in low_sbl.unflatten(2, (ranks, 2, self.low_rank)).unbind(3))
        decay = F.linear(f.transpose(0, 1), self.f_b_weight).unflatten(2, (self.heads, self.kda.key_head_dim))
        return decay, F.linear(g, self.g_b_weight)

    def gate_arguments(self) -> dict[str, Any]:
        """Return the arguments with which `kda_rule` computes the log decay."""
        return dict(A_log=self.A_log, dt_bias=self.dt_bias, lower_bound=self.kda.gate_lower_bound)

    def kernel_sizes(self) -> dict[str, Any]:
        """Return the head counts and dims of this rank, as `conv_gates` takes them."""
        return dict(
            num_key_heads=self.heads,
            num_value_heads=self.heads,
            key_head_dim=self.kda.key_head_dim,
            value_head_dim=self.kda.value_head_dim,
            gate_width=2 * self.low_rank,
        )

    def backends(self, sequence_length: int, batch_size: int, documents: bool = False) -> list[Choice]:
        kda, s, b = self.kda, sequence_length, batch_size
        like = torch.empty((), dtype=self.config.params_dtype, device=self.A_log.device)  # expanded: no memory
        k, v = (like.expand(b, s, self.heads, dim) for dim in (kda.key_head_dim, kda.value_head_dim))
        return [
            explain_conv_gates(like.expand(s, b, self.packed_width), self.conv_weight, **self.kernel_sizes()),
            explain_kda_rule_of_slices(k, v, group=self.cp_group, documents=documents),
            explain_gated_rmsnorm(v, like.expand(s, b, self.v_width), self.o_norm_weight),
        ]
