"""In which format matrix products and attention run, and from whose parts the layers are built."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from megatron_hybrid.config.base import Section
from megatron_hybrid.config.errors import Problems


class PrecisionConfig(Section):
    """FP8 on Hopper. Parameters, residual stream, norms, the delta rule, embedding and logits stay in train.dtype."""

    parts: Literal["auto", "transformer_engine", "local"] = "auto"
    """Linears, norms and attention: Transformer Engine's, or megatron-core's own with torch's attention (any device).
    auto: Transformer Engine's on a GPU in bf16 where it is installed; the run says which and why."""
    linear: Literal["fp8_delayed", "fp8_tensorwise", "fp8_blockwise"] | None = None
    """Matrix products of the mixers' projections and the MLPs; None: in train.dtype. delayed: scales from past steps;
    tensorwise: from the tensor at hand; blockwise: 1 x 128 and 128 x 128 blocks."""
    attention: Literal["fp8"] | None = None
    """Softmax attention; None: in train.dtype. fp8 scales from past steps, the only way Hopper trains it."""
    bf16_layers_at_start: NonNegativeInt = 0
    """Layers whose linears stay in bf16."""
    bf16_layers_at_end: NonNegativeInt = 0
    amax_history: PositiveInt = 1024
    """Steps that scales from past steps look back on."""
    cache_weights: bool = True
    """Keep FP8 copies of the weights over the micro-batches of a step: two bytes a parameter for a cast less each."""

    @model_validator(mode="after")
    def _check(self) -> "PrecisionConfig":
        problems = Problems()
        if self.linear and self.parts == "local":
            problems.add("linear", f"{self.linear} is Transformer Engine's; set parts to auto, or linear to null")
        if self.attention and not self.linear:
            problems.add(
                "attention",
                "fp8 needs FP8 linears beside it, whose backward pass keeps its scales; set linear to fp8_tensorwise, or "
                "attention to null",
            )
        if self.linear is None or self.linear == "fp8_delayed":
            for field in ("bf16_layers_at_start", "bf16_layers_at_end"):
                if count := getattr(self, field):
                    remedy = "set linear to fp8_tensorwise, or this to 0"
                    problems.add(field, f"{count} has no meaning with linear = {self.linear or 'null'}; {remedy}")
        problems.raise_if_any()
        return self

    @property
    def fp8(self) -> bool:
        """Whether anything runs in FP8."""
        return self.linear is not None
