"""AdamW over megatron-core's data parallel wrappers, and the state that checkpoints need of it."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from megatron_hybrid.checkpoint.collect import Collector, OptimizerShard
from megatron_hybrid.checkpoint.writer import SavedShard
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.model.megatron_config import DTYPES
from megatron_hybrid.model.param_layout import ParamLayout
from megatron_hybrid.precision.fp8_parameters import casting_rows_alone, forget_last_cast, held_in_fp8
from megatron_hybrid.train.optimizers.host_offload import (
    adams,
    hand_over_gradients,
    name_of,
    offload_options,
    renew_copies,
    updated_tensor,
)


def wrap_data_parallel(chunks, parallel: ParallelConfig, precision: PrecisionConfig) -> list[DistributedDataParallel]:
    """megatron-core's DDP around each model chunk: gradients in fp32, summed in fp32."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
        bucket_size=parallel.bucket_size,
        fp8_param_gather=precision.fp8_param_gather,
        check_for_nan_in_grad=False,  # the trainer looks at the gradient norm, and skips the step
    )
    return [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]


def exempt_from_decay(layout: ParamLayout, chunks, no_decay: set[str]) -> set[torch.nn.Parameter]:
    """Parameters of the groups `no_decay` (train.optimizer.no_decay), the same on every tensor parallel rank."""
    first = ParamLayout(layout.model, 0, layout.ranks)  # another rank's part may be padding alone, without pieces
    return {
        parameter
        for _, parameter, slices in first.parameters(chunks)
        if slices[0].tensor.decay_group in no_decay
    }


class Optimizer:
    """AdamW with the recipe's decay groups; a step is taken or skipped once its gradient norm is known.

    Args:
        wrapped: the model chunks in their data parallel wrappers.
        layout: tells which tensor each parameter holds, hence its decay group.
    """

    def __init__(
        self,
        wrapped: list[DistributedDataParallel],
        layout: ParamLayout,
        train: TrainConfig,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
    ):
        adam = train.optimizer
        self.wrapped, self.chunks = wrapped, [w.module for w in wrapped]
        self.overlap_param_gather = parallel.overlap_param_gather
        self.in_fp8 = [p for chunk in self.chunks for p in chunk.parameters() if held_in_fp8(p)]
        self.clip, self.weight_decay = adam.clip_grad, adam.weight_decay
        exempt = exempt_from_decay(layout, self.chunks, set(adam.no_decay))
        config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=adam.lr,
            min_lr=0.0,
            adam_beta1=adam.betas[0],
            adam_beta2=adam.betas[1],
            adam_eps=adam.eps,
            weight_decay=adam.weight_decay,
            clip_grad=adam.clip_grad,
            bf16=train.dtype == "bf16",
            params_dtype=DTYPES[train.dtype],
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
            fp8_recipe=precision.fp8_recipe if self.in_fp8 else None,
            **offload_options(adam.offload_fraction),
        )
        no_decay = ParamWithNamePredicate(name="no_decay", fn=lambda parameter, name: parameter in exempt)
        overrides = {ParamKey(with_name_predicate=no_decay): {"wd_mult": 0.0}} if exempt else {}
        # megatron-core makes slices of fp32 parameters with a graph, and hands them to torch.optim, which takes leaves alone
        with torch.set_grad_enabled(not adam.offload_fraction):
            self.megatron = get_megatron_optimizer(config, wrapped, config_overrides=overrides)
        self.set_fp8_parameters()

    @property
    def name(self) -> str:
        """Whose Adam it is."""
        return name_of(self._parts()[0].optimizer)

    @property
    def scale_loss(self):
        return self.megatron.scale_loss

    def zero_grad(self) -> None:
        self.megatron.zero_grad()

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Global norm over all parameters of the model, after reduction and before clipping."""
        self.megatron.prepare_grads()
        return float(self.megatron.get_grad_norm())

    @torch.no_grad()
    def step(self, lr: float, gradient_norm: float) -> None:
        """Clip by the norm just computed, then update."""
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
            hand_over_gradients(part.optimizer)
        with self._casting():
            self.megatron.step_with_ready_grads()

    def _parts(self) -> list:
        return getattr(self.megatron, "chained_optimizers", [self.megatron])

    @torch.no_grad()
    def set_fp8_parameters(self) -> None:
        """Cast the fp32 weights of what is held in FP8, on all ranks, as an update does."""
        if not self.in_fp8:
            return
        forget_last_cast(self.in_fp8)
        with self._casting():
            for part in self._parts():
                part._copy_main_params_to_model_params()
        self._gather()

    def _casting(self):
        return casting_rows_alone() if self.in_fp8 else nullcontext()

    @torch.no_grad()
    def gather_parameters(self) -> None:
        """Have on all ranks what the last update made of the parameters. Where the gathering is overlapped, each rank has but its
        own part of them until the next forward pass."""
        if self.overlap_param_gather:
            self._gather()

    def _gather(self) -> None:
        for chunk in self.wrapped:
            chunk.start_param_sync(force_sync=True)

    # ---- state, for checkpoints

    def shards(self) -> dict[torch.nn.Parameter, OptimizerShard]:
        """Adam's state of every parameter of which this rank has some; zero before the first step."""
        found = {}
        for part in self._parts():
            adam_of = {
                main: adam for adam in adams(part.optimizer) for group in adam.param_groups for main in group["params"]
            }
            for parameter, main, start, stop in self._main_parameters(part):
                adam = adam_of[main]
                state = adam.state[main]
                if "exp_avg" not in state:
                    state.update(exp_avg=torch.zeros_like(main), exp_avg_sq=torch.zeros_like(main))
                    if self._counts_by_parameter(adam):
                        on = main.device if adam.param_groups[0]["fused"] else None
                        state["step"] = torch.zeros((), device=on)
                states = {name: state[name].view(-1) for name in ("exp_avg", "exp_avg_sq")}
                if parameter.dtype != torch.float32:
                    states["master"] = main.detach().view(-1)
                found[parameter] = OptimizerShard(start, stop, states)
        return found

    def _main_parameters(self, part):
        """(model parameter, the fp32 tensor that Adam updates, its range of the flattened parameter)."""
        if isinstance(part, DistributedOptimizer):
            # not model_param_group_index_map (distrib_optimizer.py:300): where a group has both fp32 and bf16 parameters,
            # its places are not those of the optimizer's list, and A_log would get a matrix's moments
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
                main = getattr(parameter, "main_param", None)
                yield parameter, parameter if main is None else main, 0, parameter.numel()

    @staticmethod
    def _counts_by_parameter(inner) -> bool:
        """torch's AdamW counts steps in a tensor a parameter; Transformer Engine's and Apex's in a number a group."""
        return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))

    @property
    def updates(self) -> int:
        """Adam's own step count, for its bias correction; skipped steps do not count."""
        for adam in self._adams():
            if self._counts_by_parameter(adam):
                counts = [state["step"] for state in adam.state.values() if "step" in state]
            else:
                counts = [group["step"] for group in adam.param_groups if "step" in group]
            if counts:
                return int(counts[0])
        return 0

    def set_updates(self, count: int) -> None:
        """Restore the step count."""
        for adam in self._adams():
            if self._counts_by_parameter(adam):
                for state in adam.state.values():
                    state["step"] = torch.full_like(state["step"], float(count))  # a tensor of its own
            elif count:
                for group in adam.param_groups:
                    group["step"] = count

    def _adams(self) -> list[torch.optim.Optimizer]:
        return [adam for part in self._parts() for adam in adams(part.optimizer)]

    def renew_copies(self) -> None:
        """After parameters are loaded: those that the host has copies of are the same there."""
        for part in self._parts():
            renew_copies(part.optimizer)


class MegatronCollector(Collector):
    """Walks this rank's part of megatron-core's model and optimizer; weights held in FP8 come from their masters."""

    def __init__(self, optimizer: Optimizer, layout: ParamLayout, groups, sharded: bool):
        super().__init__(optimizer.chunks, layout, groups, optimizer.shards(), sharded)
        self.optimizer = optimizer

    def from_master(self, parameter: torch.nn.Parameter) -> bool:
        return held_in_fp8(parameter)

    def set_parameters(self) -> None:
        """Cast the masters that were loaded, and copy what has none."""
        self.optimizer.set_fp8_parameters()
        self.optimizer.renew_copies()

    def shards(self) -> Iterator[SavedShard]:
        """What this rank saves, once all ranks have the newest parameters."""
        self.optimizer.gather_parameters()
        yield from super().shards()
