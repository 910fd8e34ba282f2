"""The Gated DeltaNet mixer (arXiv 2412.06464) with tensor, sequence and context parallelism.

    project  ->  conv, gates  ->  delta rule  ->  gated norm  ->  project

Tensor parallel ranks share the heads: each rank's slice of every weight is whole heads. Context parallel ranks share the
tokens, and pass on states and the inputs that the convolution looks back on. The mathematics is in `hybrid_kernels`, whose
dispatch chooses the backend.

Shapes: s tokens of this rank, b sequences, h hidden size, w width of in_proj's output on this rank.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from hybrid_kernels.conv_gates import conv_gates
from hybrid_kernels.conv_gates import explain as explain_conv_gates
from hybrid_kernels.dispatch import Choice
from hybrid_kernels.gated_rmsnorm import explain as explain_gated_rmsnorm
from hybrid_kernels.gated_rmsnorm import gated_rmsnorm
from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.model_fields import ModelFields
from megatron_hybrid.arch.packing import FP8_ALIGNMENT
from megatron_hybrid.base.errors import UserError
from megatron_hybrid.distributed.context_parallel import with_halo
from megatron_hybrid.distributed.state_passing import (
    explain_gated_delta_rule_of_slices,
    gated_delta_rule_of_slices,
)
from megatron_hybrid.mixers.backend import Backend, Linears
from megatron_hybrid.mixers.documents import Documents
from megatron_hybrid.mixers.gated_delta_net.config import GatedDeltaNetConfig
from megatron_hybrid.mixers.gated_delta_net.spec import parameters, sizes
from megatron_hybrid.mixers.linears import build_linears, recomputes_between_linears, recomputes_layers
from megatron_hybrid.mixers.mixer import Mixer
from megatron_hybrid.mixers.recompute import between_linears


@dataclass
class GatedDeltaNetSubmodules:
    """Parts of GatedDeltaNet: a column-parallel linear, with the pre-norm or not, and a row-parallel one."""

    in_proj: type
    out_proj: type


def module_spec(model: ModelFields, block: Block, backend: Backend, linears: Linears) -> ModuleSpec:
    """Return the spec of a model's mixer."""
    return mixer_module_spec(sizes(model), linears)


def mixer_module_spec(gdn: GatedDeltaNetConfig, linears: Linears) -> ModuleSpec:
    """Return the spec of a mixer of these sizes in any megatron-core model."""
    submodules = GatedDeltaNetSubmodules(in_proj=linears.input, out_proj=linears.output)
    return ModuleSpec(module=GatedDeltaNet, params=dict(gdn=gdn), submodules=submodules)


def kept_by_rule(config: TransformerConfig) -> str:
    """Return what the delta rule keeps for its backward pass, its argument `save`: states where a config asks for them or where the
    pass that keeps them is a recomputation. A TransformerConfig that is not this package's cannot ask.
    """
    asked = getattr(config, "keep_delta_rule_states", False)
    return "states" if asked or recomputes_between_linears(config) or recomputes_layers(config) else "scores"


class GatedDeltaNet(Mixer):
    """The Gated DeltaNet mixer of one layer, on this rank's heads.

    The arguments after `submodules` are TransformerLayer's, except for `gdn`. `cp_comm_type` and `pp_layer_offset` say how
    attention exchanges tokens and is numbered. Nothing here depends on them.
    """

    obeys_documents = True

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        gdn: GatedDeltaNetConfig,
        cp_comm_type: str | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config, layer_number, pg_collection, parameters(gdn, config.hidden_size))
        self.gdn, ranks = gdn, self.tp_group.size()
        self.q_width, _, self.v_width, self.gate_width, _, self.heads = self.packing["in_proj.weight"].rank_sizes(ranks)
        self.packed_width = self.packing["in_proj.weight"].rank_shape(ranks)[0]
        self.recompute = recomputes_between_linears(config)
        self.kept_by_rule = kept_by_rule(config)
        self.in_proj, self.out_proj = build_linears(submodules, config, self.tp_group, self.packed_width, self.v_width)
        self._check_fp8()
        self.conv_weight = self.new_parameter("conv_weight")
        self.A_log, self.dt_bias = self.new_parameter("A_log"), self.new_parameter("dt_bias")
        self.o_norm_weight = self.new_parameter("o_norm_weight")
        # it serves every rank's heads: its gradient is summed over the ranks, once per step together with the other norms'
        self.o_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.finish()

    def _check_fp8(self) -> None:
        if not self.config.fp8:
            return
        if isinstance(self.in_proj, ColumnParallelLinear):
            raise UserError(
                f"fp8: {self.config.fp8} needs Transformer Engine's linears; build the layer spec with backend="
                '"transformer_engine", or set it to None'
            )
        for field, size in (("hidden_size", self.config.hidden_size), ("value_head_dim", self.v_width)):
            if size % FP8_ALIGNMENT:
                raise UserError(
                    f"{field}: a rank's weights have {size} columns, which FP8 needs to be a multiple of {FP8_ALIGNMENT}"
                )

    def mix(
        self, hidden_states: torch.Tensor, rotary_pos_emb: torch.Tensor | None, documents: Documents | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Project, convolve, apply the delta rule and its norm, and project back. Angles are for attention layers."""
        packed, _ = self.in_proj(hidden_states)
        between = partial(self._between_projections, documents=documents)
        return between_linears(between, packed, self.out_proj, self.recompute and self.training)

    def _between_projections(self, packed_sbw: torch.Tensor, documents: Documents | None) -> torch.Tensor:
        positions_bs = documents.positions_bs if documents else None
        packed_sbw, halo_sbw = with_halo(packed_sbw, self.gdn.conv_kernel_size - 1, self.cp_group)
        # conv_gates returns the gate as well: slicing it here would cost one more gradient as wide as in_proj's output
        q, k, v, g, beta, gate = conv_gates(
            packed_sbw,
            self.conv_weight,
            self.A_log,
            self.dt_bias,
            **self.kernel_sizes(),
            allow_negative_eigenvalues=self.gdn.allow_negative_eigenvalues,
            halo_sbw=halo_sbw,
            positions_bs=positions_bs,
            return_gate=True,
        )
        o = gated_delta_rule_of_slices(
            q, k, v, g, beta, group=self.cp_group, positions_bs=positions_bs, save=self.kept_by_rule
        )
        weight = self.o_norm_weight
        if not self.config.sequence_parallel:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
        return gated_rmsnorm(o, gate, weight, self.gdn.norm_eps)

    def kernel_sizes(self) -> dict[str, Any]:
        """Return the head counts and dims of this rank, as `conv_gates` takes them."""
        gdn = self.gdn
        return dict(
            num_key_heads=self.q_width // gdn.key_head_dim,
            num_value_heads=self.heads,
            key_head_dim=gdn.key_head_dim,
            value_head_dim=gdn.value_head_dim,
        )

    def backends(self, sequence_length: int, batch_size: int, documents: bool = False) -> list[Choice]:
        gdn, s, b = self.gdn, sequence_length, batch_size
        like = torch.empty((), dtype=self.config.params_dtype, device=self.A_log.device)  # expanded: no memory
        gates = self.A_log.detach()[:1].expand(b, s, self.heads)
        q = like.expand(b, s, self.q_width // gdn.key_head_dim, gdn.key_head_dim)
        v = like.expand(b, s, self.heads, gdn.value_head_dim)
        packed = like.expand(s, b, self.packed_width)
        return [
            explain_conv_gates(packed, self.conv_weight, **self.kernel_sizes()),
            explain_gated_delta_rule_of_slices(q, q, v, gates, gates, group=self.cp_group, documents=documents),
            explain_gated_rmsnorm(v, packed[..., : self.gate_width], self.o_norm_weight),
        ]
