"""In which format matrix products and attention run, and from whose parts the layers are built."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from megatron_hybrid.base.errors import Problems
from megatron_hybrid.base.section import Section


class PrecisionConfig(Section):
    """FP8 on Hopper. Residual stream, norms, the delta rule, embedding and logits stay in train.dtype; so do parameters, unless
    fp8_parameters is set."""

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
    """Keep the FP8 copies of the weights, two bytes a parameter, over the micro-batches of a step. false: every micro-batch makes
    its own and keeps them until its backward pass, which saves memory under full recompute alone."""
    fp8_parameters: bool = False
    """Hold the weights of FP8 linears in FP8 alone: data parallel ranks gather one byte a parameter, not two, and nothing is
    cast in the forward pass. Their true values are the optimizer's fp32 ones, which checkpoints hold."""

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
        if self.fp8_parameters:
            self._check_fp8_parameters(problems)
        problems.raise_if_any()
        return self

    def _check_fp8_parameters(self, problems: Problems) -> None:
        if not self.linear:
            remedy = "set linear to fp8_tensorwise, or this to false"
            problems.add("fp8_parameters", f"true needs FP8 linears, whose weights it is about; {remedy}")
        if not self.cache_weights:
            remedy = "set it to true, or fp8_parameters to false"
            problems.add("cache_weights", f"false has no meaning with fp8_parameters: no weight is ever cast; {remedy}")

    @property
    def fp8(self) -> bool:
        """Whether anything runs in FP8."""
        return self.linear is not None
