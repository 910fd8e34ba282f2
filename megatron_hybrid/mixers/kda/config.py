"""Configuration section of Kimi Delta Attention, `model.kda`."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_hybrid.arch.decay_init import check_decay_init
from megatron_hybrid.base.errors import Problems
from megatron_hybrid.base.section import Section


class KimiDeltaAttentionConfig(Section):
    """The Kimi Delta Attention mixer (arXiv 2510.26692) as in Kimi Linear."""

    num_heads: PositiveInt
    """Heads of q, k, v, the gates and the state."""
    key_head_dim: PositiveInt
    """Channels of a head of q and k. Each has a decay of its own."""
    value_head_dim: PositiveInt
    gate_rank: PositiveInt | None = None
    """Rank of the projections of the decay and of the output gate. None: value_head_dim."""
    conv_kernel_size: Literal[4] = 4
    """Taps of the causal depthwise convolutions on q, k and v."""
    allow_negative_eigenvalues: bool = False
    """beta in (0, 2) instead of (0, 1)."""
    gate_lower_bound: float | None = Field(None, ge=-5, lt=0)
    """Least log decay per token: it is gate_lower_bound * sigmoid(exp(A_log) * x) instead of -exp(A_log) * softplus(x)."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the gated output norm; its own, not the model's."""
    a_init_range: tuple[float, float] = Field((1.0, 16.0), strict=False)
    """A_log starts as the log of a uniform draw from this range. With gate_lower_bound it starts as 0."""
    dt_init_range: tuple[PositiveFloat, PositiveFloat] = Field((1e-3, 0.1), strict=False)
    """dt_bias starts as the inverse softplus of a log-uniform draw from this range."""
    dt_init_floor: PositiveFloat = 1e-4

    @model_validator(mode="after")
    def _check(self) -> "KimiDeltaAttentionConfig":
        problems = Problems()
        check_decay_init(self, problems)
        problems.raise_if_any()
        return self

    @property
    def key_dim(self) -> int:
        """Width of q, of k, and of the decay."""
        return self.num_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of v, and of the output gate."""
        return self.num_heads * self.value_head_dim

    @property
    def rank(self) -> int:
        """gate_rank, or its default."""
        return self.gate_rank or self.value_head_dim
