"""The contract of a mixer: everything that the project asks of it without torch.

A mixer is a folder with `spec.py` (a MixerSpec that registers itself) and `module.py` (its torch module). Guide:
docs/development/extending.md.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_hybrid.arch.blocks import Block, Blocks
from megatron_hybrid.arch.costs import Direction, Operation, Shard, Work
from megatron_hybrid.arch.model_fields import ModelFields
from megatron_hybrid.arch.packing import PackedParameter
from megatron_hybrid.base.errors import Problems
from megatron_hybrid.base.section import Section

Feature = Literal["context_parallel", "fp8", "fp8_attention"]


@dataclass(frozen=True)
class Layout:
    """The numbers of a run's layout that a mixer's rules may depend on."""

    tensor_parallel_size: int
    context_parallel_size: int
    sequence_length: int
    fp8: bool
    fp8_attention: bool


@dataclass(frozen=True)
class HeadGroups:
    """Heads that tensor parallelism shares over ranks. It pads them, so more ranks than groups would hold dummies alone."""

    count: int
    field: str
    """Configuration field that sets the count: `model.gdn.num_key_heads`."""
    title: str
    """Words for the groups: `Gated DeltaNet key heads`."""
    heads: tuple[tuple[str, int], ...]
    """(words, true count) of every kind of head. Each count is a multiple of the groups'."""


class MixerSpec(ABC):
    """Torch-free description of a mixer. Every consumer iterates over registered specs and knows none by name."""

    name: ClassVar[str]
    """Name in Block.mixer: its folder."""
    prefix: ClassVar[str]
    """Of its tensors' names (layers.3.gdn.q_proj.weight); with a config_class, also the section's name in `model`."""
    config_class: ClassVar[type[Section] | None] = None
    """Section of `model` with its sizes. None: they are fields of `model` itself."""
    blocks: ClassVar[Blocks]
    """Blocks that it brings, by layer_pattern symbol."""
    input_linear: ClassVar[str]
    """Module path of its column-parallel linear, into which a pre-norm is fused."""
    output_linear: ClassVar[str]
    """Module path of its row-parallel linear, which a post-norm follows."""
    supports: ClassVar[frozenset[Feature]] = frozenset()

    @property
    def module(self) -> str:
        """Dotted name of the file with its torch module: `module.py` next to the spec."""
        return f"{type(self).__module__.rpartition('.')[0]}.module"

    @abstractmethod
    def parameters(self, model: ModelFields, block: Block) -> tuple[PackedParameter, ...]:
        """Return its parameters with their packing, in the order in which they are applied.

        Tensor names are relative to the mixer (`q_proj.weight`); parameter names to its module (`in_proj.weight`).
        """

    @abstractmethod
    def head_groups(self, model: ModelFields, block: Block) -> HeadGroups:
        """Return the heads that tensor parallelism shares."""

    @abstractmethod
    def flops(self, model: ModelFields, block: Block, sequence_length: int) -> int:
        """Return forward FLOPs per token besides the GEMMs of its linears."""

    @abstractmethod
    def operations(self, shard: Shard) -> list[Operation]:
        """Return its operations, first to last, with the norms of the block: activation memory for the planner."""

    @abstractmethod
    def work(self, shard: Shard, direction: Direction) -> list[Work]:
        """Return the work of one pass, without the norms of the block: time for the planner."""

    def check(self, model: ModelFields, block: Block, symbol: str) -> Problems:
        """Return what is wrong with a model that has this block. Fields are relative to `model`."""
        return Problems()

    def check_layout(self, model: ModelFields, block: Block, layout: Layout) -> Problems:
        """Return what is wrong with a layout of a model that has this block. Fields are whole paths."""
        return Problems()
