"""DeepSpeed's ZeRO optimizer: gradient norm, steps that can be skipped, and the state that checkpoints need."""

import os
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.arch.optimizers.spec import MASTER, OptimizerSpec
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.base.resolve import resolve
from megatron_hybrid.checkpoint.collect import Collector, OptimizerShard, full_shape
from megatron_hybrid.config.train import OptimizerConfig
from megatron_hybrid.config.zero import ZeroConfig
from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.model.param_layout import ParamLayout
from megatron_hybrid.train.engines.deepspeed.fp32_scalars import Fp32Scalars
from megatron_hybrid.train.optimizers.state import set_step_count, state_of, step_count


def build_optimizer(
    decayed: list[torch.nn.Parameter],
    exempt: list[torch.nn.Parameter],
    spec: OptimizerSpec,
    settings: OptimizerConfig,
    zero: ZeroConfig,
) -> torch.optim.Optimizer:
    """Build the optimizer that DeepSpeed runs: a vectorized one for state in host memory, torch's on the device.

    Raises:
        ConfigError: state in host memory, and an optimizer without an implementation for it.
    """
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, settings.weight_decay), (exempt, 0.0))
        if parameters
    ]
    arguments = dict(lr=settings.lr, **spec.torch_arguments(settings))
    optimizer: torch.optim.Optimizer
    if zero.offload_optimizer == "none" or not has_cuda():
        optimizer = resolve(spec.torch_class)(groups, **arguments, fused=has_cuda())
        return optimizer
    if spec.host_class is None:
        raise ConfigError.at("zero.offload_optimizer", f"cpu cannot run {spec.name} in host memory; set it to none")
    _use_a_share_of_the_cores()
    optimizer = resolve(spec.host_class)(groups, **arguments)
    return optimizer


def _use_a_share_of_the_cores() -> None:
    """Let this rank use its share of the node's cores. Launchers give each rank one thread, too few for updates on the host."""
    share = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # DeepSpeed's library has its own OpenMP runtime, which reads the variable when it is loaded
    os.environ["OMP_NUM_THREADS"] = str(share)
    torch.set_num_threads(share)


class ZeroOptimizer:
    """One of DeepSpeed's ZeRO optimizers together with the fp32 scalars.

    Args:
        engine: DeepSpeed's engine.
        name: name of the implementation.
    """

    def __init__(self, engine: Any, scalars: Fp32Scalars, spec: OptimizerSpec, name: str) -> None:
        self.engine, self.scalars, self.spec, self.name = engine, scalars, spec, name
        self.zero = engine.optimizer
        self.partitioned = engine.zero_optimization_stage() == 3
        self._pending = False

    # ---- a step

    def expect_gradients(self) -> None:
        """Prepare for the first micro-batch of a step. Gradients of a skipped step are discarded."""
        if self._pending:
            self._step_with(float("inf"))
            self.scalars.discard()
        self._pending = True

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Return the global norm over all parameters of the model. It is infinite if any gradient is not finite.

        Parameters that tensor parallel ranks replicate count once.
        """
        zero = self.zero
        if self.partitioned:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(zero._get_norm_groups())
        else:
            norm = zero.scaled_global_norm()
        return float((float(norm) ** 2 + self.scalars.squared_norm()) ** 0.5)

    def step(self, lr: float, gradient_norm: float) -> None:
        """Clip by the given norm, then update."""
        for optimizer in self._inner_optimizers():
            for group in optimizer.param_groups:
                group["lr"] = lr
        self._step_with(gradient_norm)
        self.scalars.step(lr, gradient_norm)
        self._pending = False

    def _step_with(self, norm: float) -> None:
        """Run DeepSpeed's step with this norm instead of its own, which lacks the scalars.

        DeepSpeed takes an infinite norm for an overflow: it drops the gradients and changes nothing else.
        """
        zero, given = self.zero, torch.tensor(norm, device=self.zero.device)
        if self.partitioned:
            zero._get_norm_groups = lambda: [given]
        else:
            zero.scaled_global_norm = lambda norm_type=2: given
            zero.check_grad_overflow = norm == float("inf")  # in bf16, stages 1 and 2 check for an overflow only then
        try:
            self.engine.step()
        finally:
            del zero.__dict__["_get_norm_groups" if self.partitioned else "scaled_global_norm"]
        if norm == float("inf") and not self.partitioned:
            # stage_1_and_2.py:3056 keeps gradients of bf16 parameters whose state is in host memory, and would add to them
            zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))

    # ---- state, for checkpoints

    def _inner_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimizer that DeepSpeed was given, and a second one if a part of the state stays on the device."""
        second = getattr(self.zero, "backup_optimizer", None)
        return [self.zero.optimizer] if second is None else [self.zero.optimizer, second]

    def _tensors(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return a flat fp32 tensor that this rank updates, and its optimizer state."""
        state = state_of(self._inner_optimizers()[-1 if flat.is_cuda else 0], flat, self.spec)
        return {MASTER: flat.detach(), **{name: state[name] for name in self.spec.states}}

    def shards(self) -> dict[torch.nn.Parameter, OptimizerShard]:
        """Return master weights and optimizer state of this rank's part of each parameter."""
        found = self._shards_of_stage_3() if self.partitioned else self._shards_of_stages_1_and_2()
        return dict(found) | self.scalars.shards()

    def _shards_of_stages_1_and_2(self) -> Iterator[tuple[torch.nn.Parameter, OptimizerShard]]:
        # all parameters of a group lie in one flat tensor, and each rank has a contiguous part of it
        zero = self.zero
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            tensors = self._tensors(flat)
            for parameter in group:
                if (mapping := parameter._hp_mapping) is None:  # not in this rank's part
                    continue
                of_parameter, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                states = {name: tensor.narrow(0, here.start, here.numel) for name, tensor in tensors.items()}
                yield parameter, OptimizerShard(of_parameter.start, of_parameter.start + of_parameter.numel, states)

    def _shards_of_stage_3(self) -> Iterator[tuple[torch.nn.Parameter, OptimizerShard]]:
        # each parameter is split evenly over the ranks; the last rank's part is padded
        zero = self.zero
        for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            tensors = self._tensors(flat)
            for parameter in group:
                _, offset, part = zero.grad_position[zero.get_param_id(parameter)]
                total = prod(full_shape(parameter))
                start = min(zero._get_param_partition_rank(parameter) * part, total)
                stop = min(start + part, total)
                states = {name: tensor.narrow(0, offset, stop - start) for name, tensor in tensors.items()}
                yield parameter, OptimizerShard(start, stop, states)

    @torch.no_grad()
    def set_parameters(self) -> None:
        """Set the model's parameters to the rounded master weights, on all ranks."""
        zero = self.zero
        if not self.partitioned:
            zero.update_lp_params()
            return
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:  # small parameters, which every rank keeps whole
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    @property
    def updates(self) -> int:
        """The optimizer's own step count, for bias correction; skipped steps do not count."""
        return step_count(self._inner_optimizers())

    def set_updates(self, count: int) -> None:
        """Restore the step count."""
        set_step_count(
            [*self._inner_optimizers(), *([self.scalars.optimizer] if self.scalars.optimizer else [])], count
        )


class ZeroCollector(Collector):
    """Reads and writes this rank's part of master weights and optimizer state. All weights come from the masters.

    Args:
        parameters: (name, parameter, pieces) of all parameters, including the scalars that DeepSpeed does not see.
    """

    def __init__(
        self,
        optimizer: ZeroOptimizer,
        parameters: list[Any],
        chunks: list[Any],
        layout: ParamLayout,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(chunks, layout, groups, optimizer.shards(), optimizer_sharded=True)
        self.optimizer, self.parameters = optimizer, parameters

    def from_master(self, parameter: torch.nn.Parameter) -> bool:
        """Return True: no parameter is ever gathered for a checkpoint."""
        return True

    def set_parameters(self) -> None:
        """Copy the loaded masters to the parameters."""
        self.optimizer.set_parameters()
