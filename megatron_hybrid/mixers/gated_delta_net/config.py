"""Configuration section of Gated DeltaNet, `model.gdn`."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_hybrid.arch.decay_init import check_decay_init
from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import Problems
from megatron_hybrid.base.section import Section


class GatedDeltaNetConfig(Section):
    """The Gated DeltaNet mixer (arXiv 2412.06464) as in OLMo Hybrid."""

    num_key_heads: PositiveInt
    """Heads of q and k."""
    num_value_heads: PositiveInt
    """Heads of v, the gate and the state; a multiple of num_key_heads (grouped value attention)."""
    key_head_dim: PositiveInt
    value_head_dim: PositiveInt
    conv_kernel_size: Literal[4] = 4
    """Taps of the causal depthwise convolution on q, k and v."""
    allow_negative_eigenvalues: bool = True
    """beta in (0, 2) instead of (0, 1)."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the gated output norm; its own, not the model's."""
    a_init_range: tuple[float, float] = Field((0.0, 16.0), strict=False)
    """A_log starts as the log of a uniform draw from this range."""
    dt_init_range: tuple[PositiveFloat, PositiveFloat] = Field((1e-3, 0.1), strict=False)
    """dt_bias starts as the inverse softplus of a log-uniform draw from this range."""
    dt_init_floor: PositiveFloat = 1e-4

    @model_validator(mode="after")
    def _check(self) -> "GatedDeltaNetConfig":
        problems = Problems()
        if self.num_value_heads % self.num_key_heads:
            problems.add(
                "num_value_heads",
                f"{self.num_value_heads} is not a multiple of num_key_heads = {self.num_key_heads}; "
                f"the nearest is {nearest.multiple(self.num_value_heads, self.num_key_heads)}",
            )
        check_decay_init(self, problems)
        problems.raise_if_any()
        return self

    @property
    def key_dim(self) -> int:
        """Width of q, and of k."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of v, and of the gate."""
        return self.num_value_heads * self.value_head_dim
