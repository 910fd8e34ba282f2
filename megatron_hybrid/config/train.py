"""Training: batch, optimizer, learning rate schedule, and reaction to bad steps."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_hybrid.arch.optimizers import OptimizerFields, OptimizerName
from megatron_hybrid.arch.registry import decay_groups
from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import ConfigError, Problems, shown
from megatron_hybrid.base.section import Section
from megatron_hybrid.config.schedule import ScheduleConfig, check_schedule


class CommonOptimizerFields(Section):
    """Fields of train.optimizer that all optimizers read."""

    kind: OptimizerName = "adamw"
    """The optimizer. muon: Muon for the weights of linears in the layers, AdamW for everything else."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = Field((0.9, 0.95), strict=False)
    """Decay rates of the first and second moments."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    no_decay: tuple[str, ...] = Field(("embedding",), strict=False)
    """Parameter groups without weight decay: embedding, norm, and those of mixers. gdn_scalars: A_log and dt_bias."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm. 0: no clipping."""
    offload_fraction: float = Field(0.0, ge=0, le=1)
    """Fraction of master weights and optimizer state to keep and update in host memory, in whole tensors. AdamW takes 16 bytes of
    host memory per parameter. Checkpoints do not depend on it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            legal = [0.0 if beta < 0 else 0.999 if beta >= 1 else beta for beta in self.betas]
            raise ConfigError.at(
                "betas",
                f"{list(self.betas)}: each must be at least 0 and below 1; give {legal}, for example",
            )
        legal_groups = decay_groups()
        for index, group in enumerate(self.no_decay):
            if group not in legal_groups:
                raise ConfigError.at(
                    f"no_decay.{index}",
                    f"{shown(group)} is not one of {', '.join(legal_groups)}; the nearest is {nearest.word(group, legal_groups)}",
                )
        return self


class OptimizerConfig(OptimizerFields, CommonOptimizerFields):  # pydantic lists the fields of the last base first
    """Optimizer and its hyperparameters. Weight decay applies to all parameters except the groups in `no_decay`."""


class BatchRampConfig(Section):
    """Batch size ramp: the global batch size grows from start to train.global_batch_size in equal increments."""

    start: PositiveInt
    """Global batch size of the first steps."""
    increment: PositiveInt
    """Sequences by which the global batch size grows at a time."""
    samples: PositiveInt
    """Samples over which the batch size grows."""


class SequenceRampConfig(Section):
    """Sequence length ramp: samples are split into shorter sequences, whose length doubles from start to data.sequence_length.

    Tokens per step, micro-batches' tokens and the order of the data stay the same; only the context is shorter. Each length gets
    an equal share of `samples`. Reported FLOPs and predicted memory are those of whole samples.
    """

    start: PositiveInt
    """data.sequence_length divided by a power of two."""
    samples: PositiveInt
    """Samples until whole ones are trained on."""


class SkipStepConfig(Section):
    """Skip the update when loss or gradient norm is an outlier (as OLMo-core does), or not finite (always)."""

    enabled: bool = True
    """Skip outliers. False: skip only what is not finite."""
    window: int = Field(128, ge=2)
    """Number of past finite values to compare with. No update is skipped before half of them exist."""
    sigmas: PositiveFloat = 6.0
    """Standard deviations above the mean of the window from which a value is an outlier."""
    max_nonfinite_steps: PositiveInt = 20
    """Consecutive steps with a non-finite loss or gradient norm after which the run ends with an error."""


class TrainConfig(Section):
    """Optimization of a run."""

    steps: PositiveInt
    """Optimizer steps of the run, skipped ones included."""
    global_batch_size: PositiveInt
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: PositiveInt = 1
    """Sequences per forward and backward pass on a rank."""
    seed: NonNegativeInt = 1234
    """Seed of the initial weights, which are the same under every layout."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Data type of parameters and activations. Gradients, master weights, A_log and dt_bias are always fp32."""
    engine: Literal["megatron", "deepspeed"] = "megatron"
    """megatron: megatron-core, every layout. deepspeed: DeepSpeed ZeRO with offload (section `zero`), for few GPUs."""
    cuda_graph_impl: Literal["none", "full_iteration", "auto"] = "none"
    """CUDA graphs. full_iteration: launch the forward and backward passes of a step as one graph, so that small models do not wait
    for the host. No bit of the curve changes. auto: full_iteration on GPUs, none on a CPU."""
    cuda_graph_warmup_steps: PositiveInt = 3
    """Steps of the run before a graph is captured, for each shape of global batch."""
    z_loss: NonNegativeFloat = 1e-5
    """Weight of mean(logsumexp(logits)^2)."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch_ramp: BatchRampConfig | None = None
    sequence_ramp: SequenceRampConfig | None = None
    skip_step: SkipStepConfig = SkipStepConfig()
    eval_interval: PositiveInt | None = None
    """Steps between evaluations on data.validation. Endpoints of a wsd_s schedule and the last step are evaluated too. None: never
    evaluate."""
    eval_batches: PositiveInt | None = 8
    """Global batches of each validation set per evaluation, as far as the set reaches without repeats. Every evaluation reads the same
    samples. None: the whole set."""
    eval_accuracy: bool = False
    """Evaluate also the share of counted labels that the model gives the highest logit. It computes the logits a second time."""
    start_timeout: PositiveFloat | None = None
    """Seconds like hang_timeout, until the first step has ended: kernels are compiled in it. None: 1800; on CPU, hang_timeout if that
    is set."""
    hang_timeout: PositiveFloat | None = None
    """Seconds without progress after which a run has hung. All ranks then print their stacks, name the rank that lags, and exit with
    status 75. None: 10 times the longest step, between 600 and 1500."""
    replica_check_interval: PositiveInt | None = 100
    """Steps between comparisons of the parameters of data parallel ranks, which must be equal. They are compared before every
    checkpoint too. None: never."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        problems = Problems()
        check_schedule(self.schedule, self.steps, problems)
        self._check_ramp(problems)
        problems.raise_if_any()
        return self

    def _check_ramp(self, problems: Problems) -> None:
        ramp, full = self.batch_ramp, self.global_batch_size
        if ramp is None:
            return
        growth = full - ramp.start
        if growth < 0:
            problems.add(
                "batch_ramp.start", f"{ramp.start} exceeds train.global_batch_size = {full}; give at most {full}"
            )
        elif growth % ramp.increment:
            problems.add(
                "batch_ramp.increment",
                f"{ramp.increment} does not divide train.global_batch_size - start = {growth}; "
                f"the nearest is {nearest.divisor(ramp.increment, growth)}",
            )
        elif ramp.samples < growth // ramp.increment:
            problems.add(
                "batch_ramp.samples",
                f"{ramp.samples} is below the number of increments; give at least {growth // ramp.increment}",
            )

    def batch_size_at(self, consumed_samples: int) -> int:
        """Return the number of sequences of the step that starts after `consumed_samples`.

        During the ramp, each size gets an equal share of `batch_ramp.samples`.
        """
        ramp = self.batch_ramp
        if ramp is None or consumed_samples >= ramp.samples:
            return self.global_batch_size
        increments = (self.global_batch_size - ramp.start) // ramp.increment
        return ramp.start + ramp.increment * (consumed_samples * increments // ramp.samples)

    def sequence_length_at(self, consumed_samples: int, whole: int) -> int:
        """Return the length of the sequences of the step that starts after `consumed_samples`.

        Args:
            whole: data.sequence_length.
        """
        ramp = self.sequence_ramp
        if ramp is None or consumed_samples >= ramp.samples:
            return whole
        doublings = (whole // ramp.start).bit_length() - 1
        return ramp.start << (consumed_samples * doublings // ramp.samples)

    def samples_after(self, steps: int) -> int:
        """Return the number of sequences that the first `steps` steps consume, skipped updates included."""
        samples = 0
        while steps and samples < (self.batch_ramp.samples if self.batch_ramp else 0):
            samples += self.batch_size_at(samples)
            steps -= 1
        return samples + steps * self.global_batch_size
