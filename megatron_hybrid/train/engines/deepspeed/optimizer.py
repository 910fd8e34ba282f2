"""AdamW in DeepSpeed's ZeRO: the gradient's norm, an update or none, and the state that checkpoints need of it."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from math import prod

import torch

from megatron_hybrid.checkpoint.collect import Collector, OptimizerShard, full_shape
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.config.train import OptimizerConfig
from megatron_hybrid.config.zero import ZeroConfig
from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.train.engines.deepspeed.fp32_scalars import MOMENTS, Fp32Scalars, adam_state, step_count
from megatron_hybrid.train.engines.deepspeed.swapped import SwappedGroups, SwappedShard


def make_adam(decayed: list, exempt: list, adam: OptimizerConfig, zero: ZeroConfig) -> torch.optim.Optimizer:
    """The AdamW that DeepSpeed is to run: its own, vectorised, for state in host memory; torch's on the device."""
    groups = [{"params": decayed, "weight_decay": adam.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    arguments = dict(lr=adam.lr, betas=adam.betas, eps=adam.eps)
    if zero.offload_optimizer != "none" and has_cuda():
        _use_a_share_of_the_cores()
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, **arguments)
    return torch.optim.AdamW(groups, **arguments, fused=has_cuda())


def _use_a_share_of_the_cores() -> None:
    """Launchers give a rank one thread; an Adam on the host wants all cores of the node, shared with the other ranks."""
    share = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # DeepSpeed's library has an OpenMP of its own, which reads it when it is loaded
    os.environ["OMP_NUM_THREADS"] = str(share)
    torch.set_num_threads(share)


class ZeroOptimizer:
    """One of DeepSpeed's ZeRO optimizers and the scalars beside it, as the trainer wants an optimizer.

    Args:
        engine: DeepSpeed's engine.
        name: whose Adam it is.
    """

    def __init__(self, engine, scalars: Fp32Scalars, name: str):
        self.engine, self.scalars, self.name = engine, scalars, name
        self.zero = engine.optimizer
        self.partitioned = engine.zero_optimization_stage() == 3
        self.swapped = SwappedGroups(engine) if self.partitioned and self.zero.swap_optimizer else None
        self._pending = False

    # ---- a step

    def expect_gradients(self) -> None:
        """Before the first micro-batch of a step. Gradients that no update took are thrown away."""
        if self._pending:
            self._step_with(float("inf"))
            self.scalars.discard()
        self._pending = True

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Global norm over all parameters of the model, duplicates of tensor parallel ranks counted once; infinite where any
        gradient is not finite."""
        zero = self.zero
        if self.partitioned:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(zero._get_norm_groups())
        else:
            norm = zero.scaled_global_norm()
        return (float(norm) ** 2 + self.scalars.squared_norm()) ** 0.5

    def step(self, lr: float, gradient_norm: float) -> None:
        """Clip by the norm just computed, then update."""
        for optimizer in self._adams():
            for group in optimizer.param_groups:
                group["lr"] = lr
        self._step_with(gradient_norm)
        self.scalars.step(lr, gradient_norm)
        self._pending = False

    def _step_with(self, norm: float) -> None:
        """DeepSpeed's step, with this norm in the place of its own, which lacks the scalars. An infinite one is its sign of
        an overflow: it drops the gradients and leaves everything else as it was."""
        zero, given = self.zero, torch.tensor(norm, device=self.zero.device)
        if self.partitioned:
            zero._get_norm_groups = lambda: [given]
        else:
            zero.scaled_global_norm = lambda norm_type=2: given
            zero.check_grad_overflow = norm == float("inf")  # stages 1 and 2 ask for an overflow in bf16 only then
        try:
            self.engine.step()
        finally:
            del zero.__dict__["_get_norm_groups" if self.partitioned else "scaled_global_norm"]
        if norm == float("inf") and not self.partitioned:
            # stage_1_and_2.py:3056 keeps those of bf16 parameters where the state is in host memory, and would add to them
            zero.averaged_gradients.update(dict.fromkeys(zero.averaged_gradients))

    # ---- state, for checkpoints

    def _adams(self) -> list[torch.optim.Optimizer]:
        """The one that DeepSpeed was given and, where a part of the state stays on the device, a second one for that part."""
        second = getattr(self.zero, "backup_optimizer", None)
        return [self.zero.optimizer] if second is None else [self.zero.optimizer, second]

    def _tensors(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat fp32 tensor that this rank updates, and its moments."""
        state = adam_state(self._adams()[-1 if flat.is_cuda else 0], flat)
        return {"master": flat.detach(), **{name: state[name] for name in MOMENTS}}

    def shards(self) -> dict[torch.nn.Parameter, OptimizerShard]:
        """Master weights and Adam's moments of what this rank holds of each parameter."""
        found = self._shards_of_stage_3() if self.partitioned else self._shards_of_stages_1_and_2()
        return dict(found) | self.scalars.shards()

    def _shards_of_stages_1_and_2(self) -> Iterator[tuple[torch.nn.Parameter, OptimizerShard]]:
        # all parameters of a group lie in one flat tensor, and each rank has a contiguous part of it
        zero = self.zero
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            tensors = self._tensors(flat)
            for parameter in group:
                if (mapping := parameter._hp_mapping) is None:  # nothing of it lies in this rank's part
                    continue
                of_parameter, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                states = {name: tensor.narrow(0, here.start, here.numel) for name, tensor in tensors.items()}
                yield parameter, OptimizerShard(of_parameter.start, of_parameter.start + of_parameter.numel, states)

    def _shards_of_stage_3(self) -> Iterator[tuple[torch.nn.Parameter, OptimizerShard]]:
        # each parameter is split evenly over the ranks, the last one's part padded
        zero = self.zero
        for number, group in enumerate(zero.fp16_groups):
            on_nvme = self.swapped is not None and self.swapped.holds(number)
            tensors = {} if on_nvme else self._tensors(zero.fp32_partitioned_groups_flat[number])
            for parameter in group:
                _, offset, part = zero.grad_position[zero.get_param_id(parameter)]
                total = prod(full_shape(parameter))
                start = min(zero._get_param_partition_rank(parameter) * part, total)
                stop = min(start + part, total)
                if on_nvme:
                    yield parameter, SwappedShard(start, stop, self.swapped, number, offset)
                    continue
                states = {name: tensor.narrow(0, offset, stop - start) for name, tensor in tensors.items()}
                yield parameter, OptimizerShard(start, stop, states)

    @torch.no_grad()
    def set_parameters(self) -> None:
        """Set the model's parameters to the master weights, rounded, on all ranks."""
        zero = self.zero
        if not self.partitioned:
            zero.update_lp_params()
            return
        for number in range(len(zero.fp16_groups)):
            on_nvme = self.swapped is not None and self.swapped.holds(number)
            with self.swapped.in_memory(number) if on_nvme else nullcontext():
                zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:  # small ones, which every rank keeps whole
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    @property
    def updates(self) -> int:
        """Adam's own step count, for its bias correction; skipped steps do not count."""
        return next((int(s["step"]) for adam in self._adams() for s in adam.state.values() if "step" in s), 0)

    def set_updates(self, count: int) -> None:
        """Restore the step count."""
        for adam in [*self._adams(), *([self.scalars.optimizer] if self.scalars.optimizer else [])]:
            for parameter, state in adam.state.items():
                state["step"] = step_count(adam, parameter, count)


class ZeroCollector(Collector):
    """Walks what this rank holds of master weights and moments: all weights come from the masters.

    Args:
        parameters: (name, parameter, pieces) of all parameters, the scalars that DeepSpeed does not see among them.
    """

    def __init__(self, optimizer: ZeroOptimizer, parameters: list, chunks, layout, groups):
        super().__init__(chunks, layout, groups, optimizer.shards(), optimizer_sharded=True)
        self.optimizer, self.parameters = optimizer, parameters

    def from_master(self, parameter: torch.nn.Parameter) -> bool:
        """All are: no parameter is ever gathered."""
        return True

    def set_parameters(self) -> None:
        """Hand the masters that were loaded to the parameters."""
        self.optimizer.set_parameters()

    def _load_states(self, reader: CheckpointReader, wanted: tuple[str, ...]) -> None:
        swapped = self.optimizer.swapped
        with swapped.writing() if swapped else nullcontext():
            super()._load_states(reader, wanted)
