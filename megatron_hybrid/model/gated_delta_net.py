"""The Gated DeltaNet mixer (arXiv 2412.06464) with tensor, sequence and context parallelism.

    project  ->  conv, gates  ->  delta rule  ->  gated norm  ->  project

Heads are shared over the tensor parallel ranks; each rank's slice of every weight is whole heads. Tokens are shared over the
context parallel ranks, which pass on states and what the convolution looks back on. The mathematics is in
`hybrid_kernels`; which backend of it runs is its dispatch's choice.
"""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule

from hybrid_kernels.conv_gates import conv_gates
from hybrid_kernels.conv_gates import explain as explain_conv_gates
from hybrid_kernels.dispatch import Choice
from hybrid_kernels.gated_delta_rule import explain as explain_gated_delta_rule
from hybrid_kernels.gated_delta_rule import gated_delta_rule
from hybrid_kernels.gated_rmsnorm import explain as explain_gated_rmsnorm
from hybrid_kernels.gated_rmsnorm import gated_rmsnorm
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.padding import PackedWidths
from megatron_hybrid.model.recompute import between_linears


@dataclass
class GatedDeltaNetSubmodules:
    """Parts of GatedDeltaNet: a column-parallel linear (with the pre-norm or not) and a row-parallel one."""

    in_proj: type
    out_proj: type


class GatedDeltaNet(MegatronModule):
    """The Gated DeltaNet mixer of one layer, on this rank's heads.

    Parameters on a rank (widths of PackedWidths): `in_proj.weight` [total, h]; `conv_weight` [q + k + v, taps]; `A_log`,
    `dt_bias` [value heads], fp32 whatever the model's dtype; `o_norm_weight` [value_head_dim], the same on every rank;
    `out_proj.weight` [h, v].
    """

    def __init__(self, config, submodules, layer_number, pg_collection, model: ModelConfig, name=None, **_):
        super().__init__(config)
        gdn, tp = model.gdn, pg_collection.tp
        self.gdn, self.tp_group, self.cp_group, self.layer_number = gdn, tp, pg_collection.cp, layer_number
        self.widths = widths = PackedWidths.of(model, tp.size())
        self.recompute = config.recompute_granularity == "selective"

        linear = dict(
            config=config, init_method=config.init_method, bias=False, skip_bias_add=False, is_expert=False, tp_group=tp
        )
        self.in_proj = submodules.in_proj(
            model.hidden_size, widths.total * tp.size(), gather_output=False, tp_comm_buffer_name="qkv", **linear
        )
        self.out_proj = submodules.out_proj(
            widths.v * tp.size(), model.hidden_size, input_is_parallel=True, tp_comm_buffer_name="proj", **linear
        )
        self.conv_weight = self._parameter(widths.conv, gdn.conv_kernel_size)
        self.A_log = self._parameter(widths.a, dtype=torch.float32)
        self.dt_bias = self._parameter(widths.a, dtype=torch.float32)
        self.o_norm_weight = self._parameter(gdn.value_head_dim, sharded=False)
        # of every rank's heads: its gradient is summed over the ranks, once a step with the other norms' where there are such
        self.o_norm_weight.sequence_parallel = config.sequence_parallel

    def _parameter(self, *shape: int, dtype: torch.dtype | None = None, sharded: bool = True) -> torch.nn.Parameter:
        dtype = dtype or self.config.params_dtype
        parameter = torch.nn.Parameter(torch.zeros(*shape, device=torch.cuda.current_device(), dtype=dtype))
        if sharded:
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        return parameter

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, **_) -> tuple[torch.Tensor, None]:
        """hidden_states [s, b, h] (this rank's tokens under sequence and context parallelism) -> ([s, b, h], None)."""
        packed, _ = self.in_proj(hidden_states)
        return between_linears(self._mix, packed, self.out_proj, self.recompute and self.training)

    def _mix(self, packed_sbw: torch.Tensor) -> torch.Tensor:
        # conv_gates hands the gate out, too: slicing it here would cost a gradient as wide as in_proj once more
        q, k, v, g, beta, gate = conv_gates(
            packed_sbw,
            self.conv_weight,
            self.A_log,
            self.dt_bias,
            **self._sizes(),
            group=self.cp_group,
            return_gate=True,
        )
        o, _ = gated_delta_rule(q, k, v, g, beta, group=self.cp_group)
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
            allow_negative_eigenvalues=gdn.allow_negative_eigenvalues,
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
            explain_gated_delta_rule(q, q, v, gates, gates, group=self.cp_group),
            explain_gated_rmsnorm(v, packed[..., : widths.gate], self.o_norm_weight),
        ]
