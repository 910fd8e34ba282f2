"""RMSNorm over the hidden width, before a layer's linears or after a row-parallel one."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import nn

from hybrid_kernels.rmsnorm import residual_rmsnorm, rmsnorm
from megatron_hybrid.base.errors import UserError
from megatron_hybrid.distributed.device import parameter_device


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in fp32. Zero-centered: * (1 + weight). `hybrid_kernels` has the kernel.

    megatron-core's WrappedTorchNorm refuses sequence parallelism. This one marks its weight, so that its gradient is summed over
    the tensor parallel ranks together with the other norms'.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps, self.zero_centered = eps, config.layernorm_zero_centered_gamma
        initial = torch.zeros if self.zero_centered else torch.ones
        self.weight = nn.Parameter(initial(hidden_size, device=parameter_device(config), dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rmsnorm(x, self.weight, self.eps, zero_centered=self.zero_centered)


class PreNorm(RMSNorm):
    """RMSNorm in front of a sublayer, which also reads the residual stream.

    With gradients it returns (norm, stream), as megatron-core's TransformerLayer accepts it (transformer_layer.py:642). The
    stream's gradient is then added in the kernel of the norm's backward pass.
    """

    def forward(self, x: torch.Tensor) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(x)
        stream, y = residual_rmsnorm(x, None, self.weight, self.eps, zero_centered=self.zero_centered)
        return y, stream


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm whose parameters are marked as RMSNorm's is."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        options = dict(device=parameter_device(config), dtype=config.params_dtype)
        super().__init__(hidden_size, eps=eps, **options)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def norm_of_config(
    config: TransformerConfig,
    hidden_size: int,
    eps: float = 1e-5,
    persist_layer_norm: bool = False,
    zero_centered_gamma: bool = False,
    normalization: str | None = None,
    has_residual: bool = False,
) -> nn.Module:
    """Return the norm that `config.normalization` names, without Transformer Engine.

    The last four arguments complete the signature of WrappedTorchNorm and TENorm, which follow the config as well.

    Raises:
        UserError: a norm that only Transformer Engine has.
    """
    if config.layernorm_zero_centered_gamma and config.normalization == "LayerNorm":
        raise UserError(
            "layernorm_zero_centered_gamma: with LayerNorm it needs Transformer Engine's norms; set it to False, or "
            "normalization to RMSNorm"
        )
    kinds = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
    if config.normalization not in kinds:
        raise UserError(f"normalization: {config.normalization} is none of {', '.join(kinds)}")
    return kinds[config.normalization](config, hidden_size, eps)


class RowParallelLinearWithNorm(nn.Module):
    """A row-parallel linear followed by a norm: the end of a post-norm sublayer.

    The norm runs on the linear's output on this rank: its share of the tokens under sequence parallelism.
    """

    def __init__(
        self, input_size: int, output_size: int, *, linear: Any, norm: Any, config: TransformerConfig, **kwargs: Any
    ):
        super().__init__()
        if kwargs.get("bias"):
            raise UserError("add_bias_linear: the norm follows the linear, and would miss its bias; set it to False")
        self.tp_group = kwargs.get("tp_group")
        self.linear = linear(input_size, output_size, config=config, **kwargs)
        self.norm = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        y, _ = self.linear(x)
        return self.norm(y), None

    def backward_dw(self) -> None:
        self.linear.backward_dw()

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describe both to megatron-core's checkpoints: the linear's columns are sharded, the norm is not."""
        state: dict[str, Any] = {}
        for name, module in self.named_children():
            options = dict(metadata=metadata, tp_group=self.tp_group)
            state.update(sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, **options))
        return state
