"""The model under DeepSpeed: ZeRO over data parallel ranks, tensor parallelism by our own groups, offload to host or NVMe.

What megatron-core's wrappers do for MegatronEngine and DeepSpeed does not is done here: gradients of weights that
sequence parallelism replicates are summed over the tensor parallel ranks, and A_log and dt_bias stay in fp32.
Checkpoints are this project's own (checkpoint/): a run goes on under either engine.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.checkpoint.collect import Collector
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.config.zero import ZeroConfig
from megatron_hybrid.model.formats import format_table
from megatron_hybrid.model.hybrid_model import build_model
from megatron_hybrid.model.initialize import initialize
from megatron_hybrid.model.param_layout import ParamLayout
from megatron_hybrid.train.engines.deepspeed.fp32_scalars import Fp32Scalars
from megatron_hybrid.train.engines.deepspeed.optimizer import ZeroCollector, ZeroOptimizer, make_adam
from megatron_hybrid.train.engines.deepspeed.settings import import_deepspeed, settings, start_engine
from megatron_hybrid.train.engines.deepspeed.swapped import in_order_of_alignment
from megatron_hybrid.train.optimizers.megatron import exempt_from_decay
from megatron_hybrid.train.step import Batch, Losses, mean_losses, on_device


class DeepSpeedEngine:
    """The model on this rank in DeepSpeed's engine; the trainer uses it as it uses MegatronEngine.

    Each rank builds the whole model (its tensor parallel part of it) before stage 3 shares the parameters out.

    Raises:
        ConfigError: DeepSpeed is not installed, or cannot offload on this machine as it is asked to.
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
        zero: ZeroConfig = ZeroConfig(),  # noqa: B008 - frozen
    ):
        deepspeed = import_deepspeed(zero)
        self.groups, self.z_loss = groups, train.z_loss
        self.chunks = build_model(model, parallel, precision, train.dtype, sequence_length, groups)
        (chunk,) = self.chunks
        self.layout = ParamLayout(model, groups.tp.rank(), groups.tp.size())
        fill(self.chunks, self.layout, train.seed)
        # now: some are about to be taken out, and stage 3 empties the others
        self.parameters = list(self.layout.parameters(self.chunks))
        _use_plain_gradients(chunk)
        self._sum_replicated_gradients(chunk)

        adam = train.optimizer
        exempt = exempt_from_decay(self.layout, self.chunks, set(adam.no_decay))
        scalars = Fp32Scalars(chunk, groups, adam)
        ordered = in_order_of_alignment(chunk.parameters(), groups.dp.size())
        optimizer = make_adam([p for p in ordered if p not in exempt], [p for p in ordered if p in exempt], adam, zero)
        name = f"{type(optimizer).__module__.split('.')[0]}.{type(optimizer).__name__}, {_in_words(zero)}"
        self._formats = format_table(self.chunks, precision, train.dtype, sequence_length, train.micro_batch_size, name)
        self.engine = start_engine(deepspeed, chunk, optimizer, groups, settings(train, zero))
        self.optimizer = ZeroOptimizer(self.engine, scalars, name)

    def _sum_replicated_gradients(self, chunk: torch.nn.Module) -> None:
        """Under sequence parallelism each tensor parallel rank sees its own tokens' part of a norm's gradient."""

        def over_tensor_parallel_ranks(gradient: torch.Tensor) -> torch.Tensor:
            total = gradient.float().contiguous()
            dist.all_reduce(total, group=self.groups.tp)
            return total.to(gradient.dtype)

        if self.groups.tp.size() > 1:
            for parameter in chunk.parameters():
                if getattr(parameter, "sequence_parallel", False):
                    parameter.register_hook(over_tensor_parallel_ranks)

    def forward_backward(self, batches: list[Batch]) -> Losses:
        """Mean losses over the global batch; its gradients are ready when this returns."""
        self.optimizer.expect_gradients()
        self.engine.train()
        losses = []
        for number, batch in enumerate(batches, 1):
            self.engine.set_gradient_accumulation_boundary(number == len(batches))
            total, *parts = self._forward(batch)
            self.engine.backward(total / len(batches), scale_wrt_gas=False)
            losses.append(torch.stack(parts))
        self.optimizer.scalars.reduce()
        return mean_losses(losses, self.groups)

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = on_device(batch)
        return self.engine(batch["tokens"], batch["labels"], batch["loss_mask"], self.z_loss)

    def gradient_norm(self) -> float:
        return self.optimizer.gradient_norm()

    def update(self, lr: float, gradient_norm: float) -> None:
        """Clip and step. Not calling it skips the step: nothing has changed."""
        self.optimizer.step(lr, gradient_norm)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> Losses:
        """Mean losses over a global batch, without gradients."""
        self.engine.eval()
        losses = [torch.stack(self._forward(batch)[1:]) for batch in batches]
        self.engine.train()
        return mean_losses(losses, self.groups)

    def collector(self) -> Collector:
        """This rank's part of weights and optimizer state, to save or to load."""
        return ZeroCollector(self.optimizer, self.parameters, self.chunks, self.layout, self.groups)

    def backends(self, batch_size: int) -> list[str]:
        """Which formats and kernels this rank runs, and why: a table."""
        return self._formats

    def close(self) -> None:
        """Let go of the memory. Stage 3's goes with the process: DeepSpeed's own hooks keep it."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        self.engine.destroy()
        FWD_MODULE_STACK.clear()


def _use_plain_gradients(chunk: torch.nn.Module) -> None:
    """Transformer Engine's linears add weight gradients to megatron's fp32 buffers; DeepSpeed reads the plain ones."""
    for module in chunk.modules():
        if getattr(module, "fuse_wgrad_accumulation", False):
            module.fuse_wgrad_accumulation = False


def _in_words(zero: ZeroConfig) -> str:
    words = f"DeepSpeed's ZeRO {zero.stage}"
    if zero.offload_optimizer != "none":
        share = "" if zero.offload_fraction == 1 else f"{zero.offload_fraction:.0%} of "
        words += f", {share}the state on {zero.offload_optimizer}"
    return words + (f", parameters on {zero.offload_parameters}" if zero.offload_parameters != "none" else "")
