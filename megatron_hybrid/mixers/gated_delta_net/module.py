"""The Gated DeltaNet mixer (arXiv 2412.06464) with tensor, sequence and context parallelism.

    project  ->  conv, gates  ->  delta rule  ->  gated norm  ->  project

Heads are shared over the tensor parallel ranks; each rank's slice of every weight is whole heads. Tokens are shared over the
context parallel ranks, which pass on states and what the convolution looks back on. The mathematics is in
`hybrid_kernels`, whose dispatch chooses the backend.
"""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

from hybrid_kernels.conv_gates import conv_gates
from hybrid_kernels.conv_gates import explain as explain_conv_gates
from hybrid_kernels.dispatch import Choice
from hybrid_kernels.gated_rmsnorm import explain as explain_gated_rmsnorm
from hybrid_kernels.gated_rmsnorm import gated_rmsnorm
from megatron_hybrid.arch.model import GatedDeltaNetConfig
from megatron_hybrid.arch.padding import FP8_ALIGNMENT, PackedWidths
from megatron_hybrid.arch.tensors import gdn_tensors
from megatron_hybrid.base.errors import UserError
from megatron_hybrid.distributed.context_parallel import with_halo
from megatron_hybrid.distributed.state_passing import (
    explain_gated_delta_rule_of_slices,
    gated_delta_rule_of_slices,
)
from megatron_hybrid.mixers.mixer import Mixer
from megatron_hybrid.mixers.recompute import between_linears
from megatron_hybrid.mixers.tensor_slices import TensorSlices, gdn_pieces

ALWAYS_FP32 = ("A_log", "dt_bias")


@dataclass
class GatedDeltaNetSubmodules:
    """Parts of GatedDeltaNet: a column-parallel linear (with the pre-norm or not) and a row-parallel one."""

    in_proj: type
    out_proj: type


class GatedDeltaNet(Mixer):
    """The Gated DeltaNet mixer of one layer, on this rank's heads.

    Parameters on a rank (widths of PackedWidths): `in_proj.weight` [total, h]; `conv_weight` [q + k + v, taps]; `A_log`,
    `dt_bias` [value heads], fp32 whatever the model's dtype; `o_norm_weight` [value_head_dim], the same on every rank;
    `out_proj.weight` [h, v].

    The arguments after `submodules` are TransformerLayer's, but for `gdn`. `cp_comm_type` and `pp_layer_offset` are how
    attention exchanges and is numbered; nothing here depends on them.
    """

    def __init__(
        self,
        config,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int = 1,
        pg_collection=None,
        *,
        gdn: GatedDeltaNetConfig,
        cp_comm_type: str | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ):
        super().__init__(config, layer_number, pg_collection)
        tp, hidden = self.tp_group, config.hidden_size
        self.gdn, self.widths = gdn, PackedWidths.of_mixer(gdn, tp.size())
        widths = self.widths
        # this package's trainer names no modules; in megatron-core's words, what is between a mixer's linears is core_attn
        modules = config.recompute_modules or ["core_attn"]
        self.recompute = config.recompute_granularity == "selective" and "core_attn" in modules

        linear = dict(config=config, bias=False, is_expert=False, tp_group=tp)
        self.in_proj = submodules.in_proj(
            hidden,
            widths.total * tp.size(),
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="qkv",
            **linear,
        )
        self.out_proj = submodules.out_proj(
            widths.v * tp.size(),
            hidden,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_comm_buffer_name="proj",
            **linear,
        )
        self._check_fp8()
        self.conv_weight = self.new_parameter(widths.conv, gdn.conv_kernel_size)
        self.A_log = self.new_parameter(widths.a, dtype=torch.float32)
        self.dt_bias = self.new_parameter(widths.a, dtype=torch.float32)
        self.o_norm_weight = self.new_parameter(gdn.value_head_dim, sharded=False)
        # of every rank's heads: its gradient is summed over the ranks, once a step with the other norms' where there are such
        self.o_norm_weight.sequence_parallel = config.sequence_parallel

        tensors = {tensor.name: tensor for tensor in gdn_tensors(gdn, hidden, "gdn")}
        self.pieces, self.pieces_of_first_rank = (
            gdn_pieces(TensorSlices(tensors, rank, tp.size()), gdn, "gdn") for rank in (tp.rank(), 0)
        )
        self.reset_parameters(gdn)

    def _check_fp8(self) -> None:
        if not self.config.fp8:
            return
        if isinstance(self.in_proj, ColumnParallelLinear):
            raise UserError(
                f"fp8: {self.config.fp8} needs Transformer Engine's linears; build the layer spec with backend="
                '"transformer_engine", or set it to None'
            )
        for field, size in (("hidden_size", self.config.hidden_size), ("value_head_dim", self.widths.v)):
            if size % FP8_ALIGNMENT:
                raise UserError(
                    f"{field}: a rank's weights have {size} columns, which FP8 needs to be a multiple of {FP8_ALIGNMENT}"
                )

    @property
    def has_dummy_heads(self) -> bool:
        return self.widths.a * self.tp_group.size() != self.gdn.num_value_heads

    def _apply(self, fn, recurse=True):
        """Convert the module, as `bfloat16()` and `to()` do, but for A_log and dt_bias: they stay fp32.

        megatron-core's Float16Module converts whole models; half precision would move the decay rates.
        """
        scalars = {name: self._parameters[name] for name in ALWAYS_FP32 if name in self._parameters}
        kept = {name: parameter.data for name, parameter in scalars.items()}
        super()._apply(fn, recurse)
        for name, values in kept.items():
            parameter = self._parameters[name]
            if parameter.dtype != values.dtype:
                parameter.data = values.to(parameter.device)
        return self

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inference_context=None,
        rotary_pos_emb=None,
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

        Rotary embeddings are the model's, for its attention layers; this mixer has no use for them.

        Raises:
            UserError: any other input than the causal mask.
        """
        self.check_mask(attention_mask)
        self.refuse(
            inference_context=inference_context,
            inference_params=inference_params,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
            sequence_len_offset=sequence_len_offset,
        )
        packed, _ = self.in_proj(hidden_states)
        return between_linears(self._mix, packed, self.out_proj, self.recompute and self.training)

    def _mix(self, packed_sbw: torch.Tensor) -> torch.Tensor:
        packed_sbw, halo_sbw = with_halo(packed_sbw, self.gdn.conv_kernel_size - 1, self.cp_group)
        # conv_gates returns the gate as well: slicing it here would cost one more gradient as wide as in_proj's output
        q, k, v, g, beta, gate = conv_gates(
            packed_sbw,
            self.conv_weight,
            self.A_log,
            self.dt_bias,
            **self._sizes(),
            allow_negative_eigenvalues=self.gdn.allow_negative_eigenvalues,
            halo_sbw=halo_sbw,
            return_gate=True,
        )
        o = gated_delta_rule_of_slices(q, k, v, g, beta, group=self.cp_group)
        weight = self.o_norm_weight
        if not self.config.sequence_parallel:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
        return gated_rmsnorm(o, gate, weight, self.gdn.norm_eps)

    def _sizes(self) -> dict:
        gdn, widths = self.gdn, self.widths
        return dict(
            num_key_heads=widths.q // gdn.key_head_dim,
            num_value_heads=widths.a,
            key_head_dim=gdn.key_head_dim,
            value_head_dim=gdn.value_head_dim,
        )

    def backends(self, sequence_length: int, batch_size: int) -> list[Choice]:
        """Which backend each op runs for such a micro-batch, and why."""
        gdn, widths, s, b = self.gdn, self.widths, sequence_length, batch_size
        like = torch.empty((), dtype=self.config.params_dtype, device=self.A_log.device)  # expanded: no memory
        gates = self.A_log.detach()[:1].expand(b, s, widths.a)
        q = like.expand(b, s, widths.q // gdn.key_head_dim, gdn.key_head_dim)
        v = like.expand(b, s, widths.a, gdn.value_head_dim)
        packed = like.expand(s, b, widths.total)
        return [
            explain_conv_gates(packed, self.conv_weight, **self._sizes()),
            explain_gated_delta_rule_of_slices(q, q, v, gates, gates, group=self.cp_group),
            explain_gated_rmsnorm(v, packed[..., : widths.gate], self.o_norm_weight),
        ]
