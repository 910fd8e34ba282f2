"""The SwiGLU MLP of every layer."""

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.mlp import MLP

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.mixers.recompute import between_linears


class SwiGLU(MLP):
    """megatron-core's MLP: down(silu(gate) * up). linear_fc1's output on a rank is `[gate | up]`.

    Selective recompute runs the activation again.
    """

    def forward(
        self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply the MLP to hidden_states [s, b, h]: this rank's tokens under sequence parallelism.

        Returns:
            ([s, b, h], None)

        Raises:
            UserError: a padding_mask, which TransformerLayer passes on for mixtures of experts.
        """
        if padding_mask is not None:
            raise UserError("padding_mask: this MLP treats all tokens alike; pass None")
        gate_up, _ = self.linear_fc1(hidden_states)
        return self._down(gate_up)

    def _down(self, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        recompute = self.config.recompute_granularity == "selective" and self.training
        return between_linears(self._activate, gate_up, self.linear_fc2, recompute)

    def _activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self.config.bias_activation_fusion:
            return bias_swiglu_impl(gate_up, None)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
