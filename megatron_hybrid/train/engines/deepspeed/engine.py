"""DeepSpeed engine: ZeRO over the data parallel ranks, tensor parallelism by our own groups, offload to host memory.

Two things that megatron-core's wrappers do and DeepSpeed does not are done here. Gradients of weights that sequence
parallelism replicates are summed over the tensor parallel ranks, and A_log and dt_bias stay in fp32. Checkpoints have
this project's own format (checkpoint/), so a run can continue under either engine.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.optimizers import OPTIMIZERS
from megatron_hybrid.checkpoint.collect import Collector
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.config.zero import ZeroConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.distributed.device import local_device
from megatron_hybrid.model.formats import format_table
from megatron_hybrid.model.hybrid_model import build_model
from megatron_hybrid.model.initialize import initialize
from megatron_hybrid.model.output_layer import TokenLosses
from megatron_hybrid.model.param_layout import ParamLayout
from megatron_hybrid.train.engines.base import run_model
from megatron_hybrid.train.engines.deepspeed.fp32_scalars import Fp32Scalars
from megatron_hybrid.train.engines.deepspeed.optimizer import ZeroCollector, ZeroOptimizer, build_optimizer
from megatron_hybrid.train.engines.deepspeed.settings import deepspeed_config, import_deepspeed, start_engine
from megatron_hybrid.train.engines.losses import BatchLosses, GlobalBatch
from megatron_hybrid.train.engines.megatron import Fill
from megatron_hybrid.train.optimizers.decay_groups import exempt_from_decay


class DeepSpeedEngine:
    """The model on this rank in DeepSpeed's engine. Implements the `Engine` protocol, as MegatronEngine does.

    Each rank builds its whole tensor parallel part of the model before stage 3 shards the parameters.

    Raises:
        ConfigError: DeepSpeed is not installed, or the requested offload cannot run on this machine.
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
        zero: ZeroConfig = ZeroConfig(),  # noqa: B008 - frozen
        documents: bool = False,
    ) -> None:
        deepspeed = import_deepspeed(zero)
        self.groups, self.z_loss, self.accuracy = groups, train.z_loss, train.eval_accuracy
        self.chunks = build_model(model, parallel, precision, train.dtype, sequence_length, groups)
        (chunk,) = self.chunks
        self.layout = ParamLayout(model, groups.tp.rank(), groups.tp.size())
        fill(self.chunks, self.layout, train.seed)
        # collected now: the fp32 scalars are about to be taken out, and stage 3 empties the other parameters
        self.parameters = list(self.layout.parameters(self.chunks))
        _use_plain_gradients(chunk)
        self._sum_replicated_gradients(chunk)

        spec, settings = OPTIMIZERS[train.optimizer.kind], train.optimizer
        exempt = exempt_from_decay(self.layout, self.chunks, set(settings.no_decay))
        scalars = Fp32Scalars(chunk, groups, spec, settings)
        decayed = [p for p in chunk.parameters() if p not in exempt]
        optimizer = build_optimizer(decayed, [p for p in chunk.parameters() if p in exempt], spec, settings, zero)
        name = f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__name__}, {_describe(zero)}"
        sizes = (train.dtype, sequence_length, train.micro_batch_size)
        self._formats = format_table(self.chunks, precision, *sizes, name, documents)
        self.engine = start_engine(deepspeed, chunk, optimizer, groups, deepspeed_config(train, zero))
        self.optimizer = ZeroOptimizer(self.engine, scalars, spec, name)

    def _sum_replicated_gradients(self, chunk: torch.nn.Module) -> None:
        """Sum gradients of replicated weights: under sequence parallelism each rank has those of its own tokens only."""

        def over_tensor_parallel_ranks(gradient: torch.Tensor) -> torch.Tensor:
            total = gradient.float().contiguous()
            dist.all_reduce(total, group=self.groups.tp)
            return total.to(gradient.dtype)

        if self.groups.tp.size() > 1:
            for parameter in chunk.parameters():
                if getattr(parameter, "sequence_parallel", False):
                    parameter.register_hook(over_tensor_parallel_ranks)

    def forward_backward(self, batches: list[Batch]) -> Callable[[], BatchLosses]:
        """Launch forward and backward passes over this rank's micro-batches, and return the function that waits for the mean losses of
        the global batch.

        Gradients of a skipped step are discarded.
        """
        self.optimizer.expect_gradients()
        self.engine.train()
        global_batch = GlobalBatch(batches, self.groups)
        for number, batch in enumerate(batches, 1):
            self.engine.set_gradient_accumulation_boundary(number == len(batches))
            losses = self._forward(batch, global_batch)
            self.engine.backward(losses.total / len(batches), scale_wrt_gas=False)
        self.optimizer.scalars.reduce()
        return global_batch.start_reading()

    def _forward(self, batch: Batch, global_batch: GlobalBatch, count_correct: bool = False) -> TokenLosses:
        batch = global_batch.sums.weigh(batch.to(local_device()))
        losses: TokenLosses = run_model(self.engine, batch, self.z_loss, count_correct)
        global_batch.sums.add(losses, batch)
        return losses

    def gradient_norm(self) -> float:
        """Return the global gradient norm before clipping."""
        return self.optimizer.gradient_norm()

    def update(self, lr: float, gradient_norm: float) -> None:
        """Clip by the given norm and update. To skip a step, do not call this: then nothing has changed."""
        self.optimizer.step(lr, gradient_norm)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> BatchLosses:
        """Return the mean losses over a global batch, without gradients."""
        self.engine.eval()
        global_batch = GlobalBatch(batches, self.groups, self.accuracy)
        for batch in batches:
            self._forward(batch, global_batch, self.accuracy)
        self.engine.train()
        return global_batch.losses()

    def collector(self) -> Collector:
        """Return the object that reads and writes this rank's weights and optimizer state for checkpoints."""
        return ZeroCollector(self.optimizer, self.parameters, self.chunks, self.layout, self.groups)

    def backends(self, batch_size: int) -> list[str]:
        """Return a table of the formats and kernels that this rank runs, with reasons."""
        return self._formats

    def close(self) -> None:
        """Release GPU memory. Stage 3's is released only when the process ends: DeepSpeed's own hooks keep it."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        self.engine.destroy()
        FWD_MODULE_STACK.clear()


def _use_plain_gradients(chunk: torch.nn.Module) -> None:
    """Make Transformer Engine's linears write plain gradients, which DeepSpeed reads, not megatron's fp32 buffers."""
    for module in chunk.modules():
        if getattr(module, "fuse_wgrad_accumulation", False):
            module.fuse_wgrad_accumulation = False  # type: ignore[assignment]


def _describe(zero: ZeroConfig) -> str:
    words = f"DeepSpeed's ZeRO {zero.stage}"
    if zero.offload_optimizer != "none":
        share = "" if zero.offload_fraction == 1 else f"{zero.offload_fraction:.0%} of "
        words += f", {share}the state on {zero.offload_optimizer}"
    return words + (f", parameters on {zero.offload_parameters}" if zero.offload_parameters != "none" else "")
