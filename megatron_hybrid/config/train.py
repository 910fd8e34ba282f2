"""How the model is trained: batch, optimizer, schedule, and what to do about a bad step."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_hybrid.config.base import Section


class OptimizerConfig(Section):
    """AdamW. Embeddings, norms and one-dimensional parameters carry the decay that `no_decay` leaves them."""

    lr: PositiveFloat = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    no_decay: tuple[Literal["embedding", "norm", "gdn_scalars"], ...] = ("embedding",)
    """Parameter groups without weight decay. gdn_scalars: A_log and dt_bias."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0: no clipping."""

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas = {list(self.betas)}: each must be at least 0 and below 1")
        return self


class ScheduleConfig(Section):
    """Learning rate by step: linear warm-up, then the shape, down to min_lr_ratio of the peak."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt | None = None
    """cosine, linear: step at which the minimum is reached (None: the last). wsd: steps of the final decay (None: a tenth)."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)


class BatchRampConfig(Section):
    """Global batch size grows from start to train.global_batch_size in equal increments over the first samples."""

    start: PositiveInt
    increment: PositiveInt
    samples: PositiveInt
    """Samples over which it grows."""


class SkipStepConfig(Section):
    """Skip the update when loss or gradient norm is an outlier (OLMo-core's SkipStepOptimizer), or not finite (always)."""

    enabled: bool = True
    window: PositiveInt = 128
    """Finite values looked back on; no skipping before half of them are there."""
    sigmas: PositiveFloat = 6.0


class TrainConfig(Section):
    """One run's optimisation."""

    steps: PositiveInt
    global_batch_size: PositiveInt
    """Sequences an optimizer step sees, over all ranks."""
    micro_batch_size: PositiveInt = 1
    """Sequences a rank runs at once."""
    seed: NonNegativeInt = 1234
    """Of the initial weights; they are the same under every layout."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of parameters and activations. Gradients, master weights, A_log and dt_bias are fp32 either way."""
    z_loss: NonNegativeFloat = 1e-5
    """Weight of mean(logsumexp(logits)^2)."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch_ramp: BatchRampConfig | None = None
    skip_step: SkipStepConfig = SkipStepConfig()
    eval_interval: PositiveInt | None = None
    """Steps between evaluations on data.validation; None: never."""
    eval_batches: PositiveInt = 8
    """Global batches an evaluation reads, the same ones every time."""
