"""State that DeepSpeed's stage 3 keeps on NVMe, for checkpoints: read, and written back, a group of parameters at a time."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.train.engines.deepspeed.fp32_scalars import MOMENTS, adam_state

ALIGNED = 1024
"""Numbers: where DeepSpeed 0.19.8 reads a gradient back from the disk to a place in its group that is no multiple of a page,
other values arrive than were written (partitioned_optimizer_swapper.py:197), without an error."""


def in_order_of_alignment(parameters: Iterable[torch.nn.Parameter], ranks: int) -> list[torch.nn.Parameter]:
    """Those first whose parts on data parallel ranks are whole pages, so that they begin at pages in their group."""
    return sorted(parameters, key=lambda parameter: parameter.numel() % (ALIGNED * ranks) != 0)


class SwappedGroups:
    """The groups whose master weights and moments lie on NVMe. The one last asked for is held in host memory.

    Groups below a mebibyte are never swapped, whatever the configuration.

    Raises:
        ConfigError: a large parameter that does not split into whole pages over the ranks.
    """

    def __init__(self, engine):
        self.engine, self.zero = engine, engine.optimizer
        self._held: tuple[int, int] | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._write_back = False
        self._check_alignment()
        for number in range(len(self.zero.fp16_groups)):
            if self.holds(number):  # moments before the first step: zero
                self.zero._optimizer_states_and_gradient_swap_in(number)
                adam_state(self.zero.optimizer, self.zero.fp32_partitioned_groups_flat[number])
                self.zero._optimizer_states_and_gradient_swap_out(number)

    def _check_alignment(self) -> None:
        swapper = self.zero.optimizer_swapper
        for parameter in (parameter for group in self.zero.fp16_groups for parameter in group):
            _, offset, part = self.zero.grad_position[self.zero.get_param_id(parameter)]
            if swapper.is_swappable_tensor(numel=part) and offset % ALIGNED:
                raise ConfigError.at(
                    "zero.offload_optimizer",
                    f"nvme needs parameters of whole pages, and one of {list(parameter.ds_shape)} is not over the data "
                    "parallel ranks; set it to cpu",
                )

    def holds(self, number: int) -> bool:
        """Whether the group lies on NVMe."""
        return self.zero._swappable_optimizer_subgroup(number)

    @contextmanager
    def in_memory(self, number: int, write_back: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """The group's own tensors, flat, while DeepSpeed's buffers hold them."""
        self.zero._optimizer_states_and_gradient_swap_in(number)
        flat = self.zero.fp32_partitioned_groups_flat[number]
        yield {"master": flat.detach(), **{name: self.zero.optimizer.state[flat][name] for name in MOMENTS}}
        if write_back:
            self.zero._optimizer_states_and_gradient_swap_out(number)
        else:
            self.zero._release_swap_buffers(number)

    def read(self, number: int) -> dict[str, torch.Tensor]:
        """Copies of the group's tensors; inside `writing`, what is written to them reaches the disk."""
        key = (number, self.engine.global_steps)
        if key != self._held:
            self._let_go()
            with self.in_memory(number) as tensors:
                self._tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            self._held = key
        return self._tensors

    def _let_go(self) -> None:
        if self._write_back and self._held is not None:
            with self.in_memory(self._held[0], write_back=True) as tensors:
                for name, tensor in tensors.items():
                    tensor.copy_(self._tensors[name])
        self._held, self._tensors = None, {}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around the loading of a checkpoint."""
        self._let_go()
        self._write_back = True
        try:
            yield
            self._let_go()
        finally:
            self._write_back = False


@dataclass
class SwappedShard:
    """As OptimizerShard (checkpoint/collect.py); its states are read when they are asked for."""

    start: int
    stop: int
    groups: SwappedGroups
    number: int
    offset: int
    """Of the parameter's part in its group."""
    replicated: bool = False

    @property
    def states(self) -> dict[str, torch.Tensor]:
        tensors = self.groups.read(self.number)
        return {name: tensor.narrow(0, self.offset, self.stop - self.start) for name, tensor in tensors.items()}
