"""What the trainer needs of whatever holds the model: losses and gradients of a batch, their norm, an update, the state.

MegatronEngine is megatron-core's: its schedules, data parallel wrappers and optimizers. DeepSpeedEngine stands beside it
(train/engines/deepspeed/engine.py).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.checkpoint.collect import Collector
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.distributed.tp_comm_overlap import start_overlap, stop_overlap
from megatron_hybrid.model.backends.choose import require_transformer_engine
from megatron_hybrid.model.formats import format_table
from megatron_hybrid.model.hybrid_model import build_model
from megatron_hybrid.model.initialize import initialize
from megatron_hybrid.model.param_layout import ParamLayout
from megatron_hybrid.train.optimizers.megatron import MegatronCollector, Optimizer, wrap_data_parallel
from megatron_hybrid.train.step import Batch, BatchRunner, Losses, prepare_for_training


class UpdateCount(Protocol):
    """An engine's optimizer, as far as the trainer knows it."""

    @property
    def updates(self) -> int:
        """Updates so far; skipped steps do not count."""

    def set_updates(self, count: int) -> None:
        """Restore that number, after a checkpoint is loaded."""


class Engine(Protocol):
    """The model on this rank and its optimizer. Every rank calls the same methods in the same order."""

    groups: ProcessGroupCollection
    optimizer: UpdateCount

    def forward_backward(self, batches: list[Batch]) -> Losses:
        """Mean losses over the global batch, of which `batches` are this rank's micro-batches; its gradients are ready, and
        those of the batch before, if no update took them, are gone."""

    def gradient_norm(self) -> float:
        """Of the whole model, averaged over the batch, before clipping."""

    def update(self, lr: float, gradient_norm: float) -> None:
        """Clip by that norm and step. Not calling it skips the step: nothing has changed."""

    def evaluate(self, batches: list[Batch]) -> Losses:
        """Mean losses over a global batch, without gradients."""

    def collector(self) -> Collector:
        """This rank's part of weights and optimizer state, to save or to load."""

    def backends(self, batch_size: int) -> list[str]:
        """Which formats and kernels this rank runs, and why: a table."""

    def close(self) -> None:
        """Let go of the memory."""


def build_engine(config: RunConfig, groups: ProcessGroupCollection, fill: Callable = initialize) -> Engine:
    """The engine of train.engine, with initial weights.

    Raises:
        ConfigError: what it is asked for cannot run here.
    """
    common = (config.model, config.train, config.parallel, config.data.sequence_length, groups, config.precision, fill)
    if config.train.engine == "deepspeed":
        from megatron_hybrid.train.engines.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(*common, config.zero)
    return MegatronEngine(*common)


class MegatronEngine:
    """The model on this rank, its optimizer, and how a global batch runs through the pipeline.

    Weights are initial ones, the same under every layout, until a checkpoint is loaded through `collector()`.
    `fill(chunks, layout, seed)` writes them: measurements, whose values do not matter, fill faster.
    """

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        parallel: ParallelConfig,
        sequence_length: int,
        groups: ProcessGroupCollection,
        precision: PrecisionConfig = PrecisionConfig(),  # noqa: B008 - frozen
        fill: Callable = initialize,
    ):
        self.groups, self.parallel, self.precision, self.sequence_length = groups, parallel, precision, sequence_length
        self.dtype = train.dtype
        if parallel.tp_comm_overlap:
            require_transformer_engine("parallel.tp_comm_overlap", model.backend, precision, train.dtype)
            tokens = sequence_length // groups.cp.size() * train.micro_batch_size
            start_overlap(precision, train.dtype, tokens, model.hidden_size, groups.tp)
        self.chunks = build_model(model, parallel, precision, train.dtype, sequence_length, groups)
        self.layout = ParamLayout(model, groups.tp.rank(), groups.tp.size())
        fill(self.chunks, self.layout, train.seed)
        self.wrapped = wrap_data_parallel(self.chunks, parallel, precision)
        self.optimizer = Optimizer(self.wrapped, self.layout, train, parallel, precision)
        self.pending = False
        prepare_for_training(self.wrapped, self.optimizer)
        self.run = BatchRunner(self.wrapped, groups, sequence_length, train.micro_batch_size, train.z_loss)

    def forward_backward(self, batches: list[Batch]) -> Losses:
        """Mean losses over the global batch; its gradients are ready when this returns."""
        if self.pending and self.precision.fp8_recipe == "delayed":
            self.optimizer.set_fp8_parameters()  # the step before was skipped, yet its scales are newer than the cast
        self.pending = True
        for chunk in self.wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self.run(batches)

    def backends(self, batch_size: int) -> list[str]:
        """Which formats and kernels this rank runs, and why: a table.

        Raises:
            ConfigError: FP8 attention that is wrong, or does not run, on this machine.
        """
        return format_table(
            self.chunks, self.precision, self.dtype, self.sequence_length, batch_size, self.optimizer.name
        )

    def close(self) -> None:
        """Let go of the memory. Hooks that C++ holds tie model and optimizer into cycles Python's collector does not see."""
        for chunk in self.wrapped:
            if self.parallel.overlap_param_gather:
                chunk.disable_forward_pre_hook(param_sync=False)
            chunk.grad_accs.clear()
            config = chunk.module.config
            config.grad_scale_func = config.no_sync_func = config.grad_sync_func = config.param_sync_func = None
        if self.parallel.tp_comm_overlap:
            stop_overlap()

    def gradient_norm(self) -> float:
        return self.optimizer.gradient_norm()

    def update(self, lr: float, gradient_norm: float) -> None:
        """Clip and step. Not calling it skips the step: nothing has changed."""
        self.optimizer.step(lr, gradient_norm)
        self.pending = False

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> Losses:
        """Mean losses over a global batch, without gradients."""
        for chunk in self.wrapped:
            chunk.eval()
        losses = self.run(batches, forward_only=True)
        for chunk in self.wrapped:
            chunk.train()
        return losses

    def collector(self) -> Collector:
        """This rank's part of weights and optimizer state, to save or to load."""
        return MegatronCollector(self.optimizer, self.layout, self.groups, self.parallel.distributed_optimizer)
