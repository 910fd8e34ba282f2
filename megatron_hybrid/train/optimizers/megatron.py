"""megatron-core's data parallel wrappers and optimizer, with the state that checkpoints need."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from itertools import chain
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.arch.optimizers import OPTIMIZERS
from megatron_hybrid.arch.optimizers.spec import MASTER, OptimizerSpec
from megatron_hybrid.checkpoint.collect import Collector, OptimizerShard
from megatron_hybrid.checkpoint.writer import SlicedTensor
from megatron_hybrid.config.parallel import ParallelConfig, averages_exactly
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.model.megatron_config import DTYPES
from megatron_hybrid.model.param_layout import ParamLayout
from megatron_hybrid.precision.fp8_parameters import is_fp8_param, reset_amax, rowwise_casts_only
from megatron_hybrid.train.cuda_graph import GraphedCall, Recorder
from megatron_hybrid.train.optimizers.decay_groups import exempt_from_decay
from megatron_hybrid.train.optimizers.host_offload import (
    assign_gradients,
    implementation_name,
    inner_optimizers,
    offload_options,
    refresh_copies,
    updated_tensor,
)
from megatron_hybrid.train.optimizers.layer_wise import tag_matrices, wrap_layer_wise
from megatron_hybrid.train.optimizers.param_gather import unlink_buffers
from megatron_hybrid.train.optimizers.state import set_step_count, state_of, step_count


def wrap_data_parallel(
    chunks: Sequence[Any],
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    spec: OptimizerSpec,
    layout: ParamLayout,
    groups: ProcessGroupCollection,
) -> list[DistributedDataParallel]:
    """Wrap each model chunk in megatron-core's DDP, with gradients stored and reduced in fp32.

    Args:
        spec: the optimizer, which may need whole matrices on one data parallel rank.
        layout: maps parameters to their packing.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
        bucket_size=parallel.bucket_size,
        fp8_param_gather=precision.fp8_param_gather,
        average_in_collective=averages_exactly(groups.dp_cp.size()),
        check_for_nan_in_grad=False,  # the trainer checks the gradient norm and skips the step
    )
    tag_matrices(spec, layout, chunks)
    if spec.whole_matrices and parallel.distributed_optimizer:
        wrapped = wrap_layer_wise(chunks, config, groups)
    else:
        wrapped = [
            DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
    for one in wrapped:
        unlink_buffers(one)
    return wrapped


class Optimizer:
    """megatron-core's optimizer with decay groups. A step is taken or skipped once its gradient norm is known.

    Args:
        wrapped: the model chunks in their data parallel wrappers.
        layout: maps parameters to tensors, hence to decay groups.
    """

    def __init__(
        self,
        wrapped: list[DistributedDataParallel],
        layout: ParamLayout,
        train: TrainConfig,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
    ) -> None:
        settings = train.optimizer
        self.spec = OPTIMIZERS[settings.kind]
        implementation = import_module(self.spec.implementation) if self.spec.implementation else None
        if implementation:
            implementation.make_known()
        self.wrapped, self.chunks = wrapped, [w.module for w in wrapped]
        self.overlap_param_gather = parallel.overlap_param_gather
        self._prepared = False
        self.in_fp8 = [p for chunk in self.chunks for p in chunk.parameters() if is_fp8_param(p)]
        self.clip, self.weight_decay = settings.clip_grad, settings.weight_decay
        exempt = exempt_from_decay(layout, self.chunks, set(settings.no_decay))
        config = MegatronOptimizerConfig(
            lr=settings.lr,
            min_lr=0.0,
            weight_decay=settings.weight_decay,
            clip_grad=settings.clip_grad,
            bf16=train.dtype == "bf16" or self.spec.whole_matrices,  # see train/optimizers/muon.py
            params_dtype=DTYPES[train.dtype],
            use_distributed_optimizer=parallel.distributed_optimizer and not self.spec.whole_matrices,
            use_layer_wise_distributed_optimizer=parallel.distributed_optimizer and self.spec.whole_matrices,
            overlap_param_gather=parallel.overlap_param_gather,
            fp8_recipe=precision.fp8_recipe if self.in_fp8 else None,
            **self.spec.megatron_fields(settings),
            **offload_options(settings.offload_fraction),
        )
        no_decay = ParamWithNamePredicate(name="no_decay", fn=lambda parameter, name: parameter in exempt)
        overrides = {ParamKey(with_name_predicate=no_decay): {"wd_mult": 0.0}} if exempt else {}
        # megatron-core slices fp32 parameters inside the autograd graph, and torch.optim accepts leaf tensors only
        with torch.set_grad_enabled(not settings.offload_fraction):
            self.megatron = get_megatron_optimizer(config, wrapped, config_overrides=overrides)
        self.packing = dict(layout.packed_parameters(self.chunks))
        if implementation:
            packing = {_main_parameter(parameter): packed for parameter, packed in self.packing.items()}
            for inner in self._inner_optimizers():
                implementation.connect(inner, packing)
        self.set_fp8_parameters()

    @property
    def name(self) -> str:
        """Name of the implementation; with several, those of all kinds of parameters."""
        return ", ".join(dict.fromkeys(implementation_name(part.optimizer) for part in self._parts()))

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Multiply the loss by the gradient scale."""
        return self.megatron.scale_loss(loss)  # type: ignore[no-any-return]

    def zero_grad(self) -> None:
        """Discard all gradients."""
        self.megatron.zero_grad()
        self._prepared = False

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Prepare the gradients for `step`, and return their global norm over all parameters of the model, after reduction and before
        clipping.
        """
        self.megatron.prepare_grads()
        self._prepared = True
        return float(self.megatron.get_grad_norm())

    @torch.no_grad()
    def step(self, lr: float, gradient_norm: float) -> None:
        """Clip by the given norm, then update.

        Raises:
            RuntimeError: `gradient_norm` was not called for these gradients. megatron-core would update by none.
        """
        if not self._prepared:
            raise RuntimeError("update needs a call of gradient_norm first, which prepares the gradients")
        self._prepared = False
        for group in self.megatron.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self.weight_decay * group.get("wd_mult", 1.0)
        for part in self._parts():
            if self.clip > 0 and (parameters := part.get_parameters()):
                clip_grad_by_total_norm_fp32(
                    parameters,
                    max_norm=self.clip,
                    total_norm=gradient_norm,
                    use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                )
            assign_gradients(part.optimizer)
        with self._casting():
            self.megatron.step_with_ready_grads()

    def use_graphs(self, recorder: Recorder, warmup: int) -> None:
        """Copy the shards of master weights to the model's weights, one kernel per parameter, as a graph after `warmup` updates.

        Clipping and Adam are a few kernels for all parameters. They take numbers that the host computes for each update.
        """
        for part in self._parts():
            if isinstance(part, DistributedOptimizer):
                part._copy_main_params_to_model_params = GraphedCall(
                    part._copy_main_params_to_model_params, warmup, recorder
                )

    def _parts(self) -> list[Any]:
        return list(_flattened(self.megatron))

    @torch.no_grad()
    def set_fp8_parameters(self) -> None:
        """Cast the fp32 weights of parameters that are held in FP8, on all ranks, as an update does."""
        if not self.in_fp8:
            return
        reset_amax(self.in_fp8)
        with self._casting():
            for part in self._parts():
                part._copy_main_params_to_model_params()
        self._gather()

    def _casting(self) -> AbstractContextManager[None]:
        return rowwise_casts_only() if self.in_fp8 else nullcontext()

    @torch.no_grad()
    def gather_parameters(self) -> None:
        """All-gather the updated parameters. With overlap_param_gather, this happens only in the next forward pass otherwise."""
        if self.overlap_param_gather:
            self._gather()

    def _gather(self) -> None:
        for chunk in self.wrapped:
            chunk.start_param_sync(force_sync=True)

    # ---- state, for checkpoints

    def shards(self) -> dict[torch.nn.Parameter, OptimizerShard]:
        """Return the state of every parameter of which this rank holds a part; zeros before the first step."""
        found = {}
        for part in self._parts():
            holder_of = {
                main: inner
                for inner in inner_optimizers(part.optimizer)
                for group in inner.param_groups
                for main in group["params"]
            }
            for parameter, main, start, stop in self._main_parameters(part):
                if main not in holder_of:
                    continue  # another part, or another data parallel rank, updates it
                spec = self.spec.of(self.packing[parameter])
                state = state_of(holder_of[main], main, spec)
                states = {name: state[name].view(-1) for name in spec.states}
                if parameter.dtype != torch.float32:
                    states[MASTER] = main.detach().view(-1)
                found[parameter] = OptimizerShard(start, stop, states)
        return found

    def _main_parameters(self, part: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, int, int]]:
        """Yield (model parameter, the fp32 tensor that is updated, its range of the flattened parameter)."""
        if isinstance(part, DistributedOptimizer):
            # model_param_group_index_map (distrib_optimizer.py:300) is wrong for groups with both fp32 and bf16 parameters:
            # its indices differ from those of the optimizer's list, so A_log would get the state of a matrix
            aware = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            for models, shards in (
                (part.model_fp32_groups, part.shard_fp32_groups),
                (
                    part.model_float16_groups,
                    part.shard_float16_groups if aware else part.shard_fp32_from_float16_groups,
                ),
            ):
                for parameter, shard in zip(chain(*models), chain(*shards), strict=True):
                    extent = part._get_model_param_range_map(parameter)["param"]
                    yield parameter, updated_tensor(part.optimizer, shard), extent.start, extent.end
            return
        for chunk in self.chunks:
            for parameter in chunk.parameters():
                yield parameter, _main_parameter(parameter), 0, parameter.numel()

    @property
    def updates(self) -> int:
        """The optimizer's own step count, for bias correction; skipped steps do not count."""
        return step_count(self._inner_optimizers())

    def set_updates(self, count: int) -> None:
        """Restore the step count."""
        set_step_count(self._inner_optimizers(), count)

    def _inner_optimizers(self) -> list[torch.optim.Optimizer]:
        return [inner for part in self._parts() for inner in inner_optimizers(part.optimizer)]

    def refresh_copies(self) -> None:
        """Update the host copies of parameters that were loaded."""
        for part in self._parts():
            refresh_copies(part.optimizer)


def _flattened(optimizer: Any) -> Iterator[Any]:
    """Yield the optimizers in megatron-core's chains, which may be nested."""
    for part in getattr(optimizer, "chained_optimizers", ()):
        yield from _flattened(part)
    if not hasattr(optimizer, "chained_optimizers"):
        yield optimizer


def _main_parameter(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return the fp32 tensor that is updated in place of a whole parameter."""
    main = getattr(parameter, "main_param", None)
    return parameter if main is None else main


class MegatronCollector(Collector):
    """Reads and writes this rank's part of megatron-core's model and optimizer. Weights held in FP8 come from their masters."""

    def __init__(
        self, optimizer: Optimizer, layout: ParamLayout, groups: ProcessGroupCollection, sharded: bool
    ) -> None:
        super().__init__(optimizer.chunks, layout, groups, optimizer.shards(), sharded)
        self.optimizer = optimizer

    def from_master(self, parameter: torch.nn.Parameter) -> bool:
        return is_fp8_param(parameter)

    def set_parameters(self) -> None:
        """Cast the masters that were loaded, and refresh the host copies of parameters without masters."""
        self.optimizer.set_fp8_parameters()
        self.optimizer.refresh_copies()

    def shards(self) -> Iterator[SlicedTensor]:
        """Yield this rank's shards, after all ranks have the updated parameters."""
        self.optimizer.gather_parameters()
        yield from super().shards()
