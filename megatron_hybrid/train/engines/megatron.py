"""Engine of megatron-core: its pipeline schedules, data parallel wrappers and optimizers."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.optimizers import OPTIMIZERS
from megatron_hybrid.checkpoint.collect import Collector
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.distributed.tp_comm_overlap import start_overlap, stop_overlap
from megatron_hybrid.model.backends.choose import require_transformer_engine
from megatron_hybrid.model.formats import format_table
from megatron_hybrid.model.hybrid_model import build_model
from megatron_hybrid.model.initialize import initialize
from megatron_hybrid.model.param_layout import ParamLayout
from megatron_hybrid.train.cuda_graph import Recorder, describe, make_recorder, side_stream
from megatron_hybrid.train.engines.graphed_passes import GraphedPasses
from megatron_hybrid.train.engines.losses import BatchLosses
from megatron_hybrid.train.engines.schedule import BatchRunner, prepare_for_training
from megatron_hybrid.train.optimizers.megatron import MegatronCollector, Optimizer, wrap_data_parallel
from megatron_hybrid.train.replicas import agreed_norm, check_parameters

Fill = Callable[[list[Any], ParamLayout, int], None]
"""Writes initial weights: `fill(chunks, layout, seed)`. Benchmarks, to which values do not matter, fill faster."""


class MegatronEngine:
    """The model on this rank and its optimizer.

    The initial weights are the same under every layout. A checkpoint is loaded through `collector()`.
    """

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        parallel: ParallelConfig,
        sequence_length: int,
        groups: ProcessGroupCollection,
        precision: PrecisionConfig = PrecisionConfig(),  # noqa: B008 - frozen
        fill: Fill = initialize,
        documents: bool = False,
    ) -> None:
        self.groups, self.parallel, self.precision, self.sequence_length = groups, parallel, precision, sequence_length
        self.dtype, self.documents = train.dtype, documents
        self.recorder = recorder = make_recorder(train)
        if parallel.tp_comm_overlap:
            require_transformer_engine("parallel.tp_comm_overlap", model.backend, precision, train.dtype)
            tokens = sequence_length // groups.cp.size() * train.micro_batch_size
            start_overlap(precision, train.dtype, tokens, model.hidden_size, groups.tp)
        self.chunks = build_model(model, parallel, precision, train.dtype, sequence_length, groups)
        self.layout = ParamLayout(model, groups.tp.rank(), groups.tp.size())
        fill(self.chunks, self.layout, train.seed)
        spec = OPTIMIZERS[train.optimizer.kind]
        with side_stream(recorder):
            self.wrapped = wrap_data_parallel(self.chunks, parallel, precision, spec, self.layout, groups)
        self.optimizer = Optimizer(self.wrapped, self.layout, train, parallel, precision)
        self._update_pending = False
        prepare_for_training(self.wrapped, self.optimizer)
        self.run = BatchRunner(self.wrapped, groups, train.z_loss, train.eval_accuracy)
        self.launches = describe(train, recorder)
        self.graphed: GraphedPasses | None = None
        if recorder is not None:
            self.use_graphs(recorder, train.cuda_graph_warmup_steps)

    def use_graphs(self, recorder: Recorder, warmup: int) -> None:
        """Run training steps as graphs, after `warmup` steps without (train/cuda_graph.py)."""
        self.graphed = GraphedPasses(self.run, warmup, recorder)
        self.optimizer.use_graphs(recorder, warmup)

    def forward_backward(self, batches: list[Batch]) -> Callable[[], BatchLosses]:
        """Launch forward and backward passes over this rank's micro-batches, and return the function that waits for the mean losses of
        the global batch.

        Gradients of a skipped step are discarded.
        """
        recipe = self.precision.recipe
        if self._update_pending and recipe is not None and recipe.scales_from_past_steps:
            self.optimizer.set_fp8_parameters()  # the last step was skipped, but its scales are newer than the cast
        self._update_pending = True
        for chunk in self.wrapped:
            if not chunk.training:  # the call visits all modules
                chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return (self.graphed or self.run).start(batches).start_reading()

    def backends(self, batch_size: int) -> list[str]:
        """Return a table of the formats and kernels that this rank runs, with reasons.

        Raises:
            ConfigError: attention to documents, or FP8 attention, that does not run or is wrong on this machine.
        """
        sizes = (self.dtype, self.sequence_length, batch_size)
        return format_table(self.chunks, self.precision, *sizes, self.optimizer.name, self.documents, self.launches)

    def close(self) -> None:
        """Release GPU memory.

        Autograd hooks held in C++ form reference cycles that Python's garbage collector cannot break.
        """
        for chunk in self.wrapped:
            if self.parallel.overlap_param_gather:
                chunk.disable_forward_pre_hook(param_sync=False)
            chunk.grad_accs.clear()
            config = chunk.module.config
            config.grad_scale_func = config.no_sync_func = config.grad_sync_func = config.param_sync_func = None
        if self.recorder is not None:
            self.recorder.release()
        self.graphed = None
        if self.parallel.tp_comm_overlap:
            stop_overlap()

    def gradient_norm(self) -> float:
        """Return the global gradient norm before clipping.

        Without the distributed optimizer, every data parallel rank computes it from its own copy of the gradients. The ranks compare
        their results, because they must decide alike whether to update.

        Raises:
            ReplicaError: data parallel ranks have different norms.
        """
        norm = self.optimizer.gradient_norm()
        if self.parallel.distributed_optimizer or self.groups.dp_cp.size() == 1:
            return norm
        return agreed_norm(norm, self.groups.dp_cp)

    def check_replicas(self, step: int) -> None:
        """Check that the data parallel ranks hold equal parameters after a step. Every rank calls it.

        Raises:
            ReplicaError: names the ranks and the first tensor that differ.
        """
        self.optimizer.gather_parameters()
        named = [(name, parameter) for name, parameter, _ in self.layout.parameters(self.chunks)]
        check_parameters(named, self.groups.dp_cp, step)

    def update(self, lr: float, gradient_norm: float) -> None:
        """Clip by the given norm and update. To skip a step, do not call this: then nothing has changed."""
        self.optimizer.step(lr, gradient_norm)
        self._update_pending = False

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> BatchLosses:
        """Return the mean losses over a global batch, without gradients."""
        for chunk in self.wrapped:
            chunk.eval()
        losses = self.run(batches, forward_only=True)
        for chunk in self.wrapped:
            chunk.train()
        return losses

    def collector(self) -> Collector:
        """Return the object that reads and writes this rank's weights and optimizer state for checkpoints."""
        return MegatronCollector(self.optimizer, self.layout, self.groups, self.parallel.distributed_optimizer)
