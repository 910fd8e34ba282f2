"""The contract of a mixer: everything that the project asks of it without torch.

A mixer is a folder with `spec.py` (a MixerSpec that registers itself) and `module.py` (its torch module). Guide:
docs/development/extending.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron_hybrid.arch.blocks import Block, Blocks
from megatron_hybrid.arch.costs import Direction, Operation, Shard, Work
from megatron_hybrid.arch.model_fields import ModelFields
from megatron_hybrid.arch.packing import PackedParameter, round_up
from megatron_hybrid.base.errors import Problems, join, shown
from megatron_hybrid.base.section import Section

QUOTE = "'"
Feature = Literal["context_parallel", "cuda_graphs", "documents", "fp8", "fp8_attention"]


@dataclass(frozen=True)
class Layout:
    """The numbers of a run's layout that a mixer's rules may depend on."""

    tensor_parallel_size: int
    context_parallel_size: int
    sequence_length: int
    fp8: bool
    fp8_attention: bool
    documents: str = "keep"
    """`data.documents`."""
    cuda_graphs: str = "none"
    """`train.cuda_graph_impl`."""


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
    width_field: str
    """Configuration field that sets the width of a head of the mixer's output: `model.head_dim`."""
    width: int

    def padded(self, heads: int, ranks: int) -> int:
        """Return how many of `heads` all tensor parallel ranks have, dummies included."""
        return round_up(self.count, ranks) * (heads // self.count)


class MixerSpec(ABC):
    """Torch-free description of a mixer. Every consumer iterates over registered specs and knows none by name."""

    name: ClassVar[str]
    """Name in Block.mixer: its folder."""
    prefix: ClassVar[str]
    """Prefix of its tensors' names (layers.3.gdn.q_proj.weight). With a config_class, also the section's name in `model`."""
    config_class: ClassVar[type[Section] | None] = None
    """Section of `model` with its sizes. None: they are fields of `model` itself."""
    blocks: ClassVar[Blocks]
    """Blocks that it brings, by layer_pattern symbol. Together with `options` they show what it implements: a block of model.blocks
    that has a value which none of them has is refused."""
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Further values that it implements, by field of Block. An empty tuple: any value, which `check` may restrict."""
    input_linear: ClassVar[str]
    """Module path of its column-parallel linear, into which a pre-norm is fused."""
    output_linear: ClassVar[str]
    """Module path of its row-parallel linear, which a post-norm follows."""
    supports: ClassVar[frozenset[Feature]] = frozenset()
    uses_rotary_embedding: ClassVar[bool] = False
    """The model's rotary embedding applies to it."""
    decay_groups: ClassVar[tuple[str, ...]] = ()
    """Its tensors' decay groups, besides matrix, convolution and norm."""
    init_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of config_class that set initial values only: a trained model computes the same with others."""

    has_rates: ClassVar[bool] = False
    """Its folder has `rates.py`, which measures its operations for the planner's hardware files: `points(model, block, degree,
    tokens, form)`."""

    has_cache: ClassVar[bool] = False
    """Its folder has `cache.py`, with which it generates text: `make_cache(mixer, batch_size, capacity)` (mixers/cache.py)."""

    @property
    def cache(self) -> str:
        """Dotted name of the file with its inference form: `cache.py` next to the spec."""
        return f"{type(self).__module__.rpartition('.')[0]}.cache"

    @property
    def rates(self) -> str:
        """Dotted name of the file that measures its operations: `rates.py` next to the spec."""
        return f"{type(self).__module__.rpartition('.')[0]}.rates"

    @property
    def module(self) -> str:
        """Dotted name of the file with its torch module: `module.py` next to the spec."""
        return f"{type(self).__module__.rpartition('.')[0]}.module"

    @abstractmethod
    def parameters(self, model: ModelFields, block: Block) -> tuple[PackedParameter, ...]:
        """Return its parameters with their packing, in the order in which they are applied.

        Tensor names are relative to the mixer (`q_proj.weight`); parameter names to its module (`in_proj.weight`).
        """

    def parameter(self, name: str, model: ModelFields, block: Block) -> PackedParameter:
        """Return one of its parameters by its name."""
        return next(parameter for parameter in self.parameters(model, block) if parameter.name == name)

    @abstractmethod
    def head_groups(self, model: ModelFields, block: Block) -> HeadGroups:
        """Return the heads that tensor parallelism shares."""

    @abstractmethod
    def flops(self, model: ModelFields, block: Block, sequence_length: int) -> int:
        """Return forward FLOPs per token besides the GEMMs of its linears.

        Args:
            sequence_length: tokens of a sequence, or the attended length of documents (arch/documents.py).
        """

    @abstractmethod
    def operations(self, shard: Shard) -> list[Operation]:
        """Return its operations, first to last, with the norms of the block: activation memory for the planner."""

    @abstractmethod
    def work(self, shard: Shard, direction: Direction) -> list[Work]:
        """Return the work of one pass, without the norms of the block: time for the planner."""

    def check(self, model: ModelFields, block: Block, symbol: str) -> Problems:
        """Return what is wrong with a model whose layer_pattern has this block. Fields are relative to `model`."""
        problems = Problems()
        if self.config_class is not None and model.section(self.prefix) is None:
            problems.add(
                self.prefix, f"is missing, and layer_pattern has {symbol} layers; {self._wanted(self.config_class)}"
            )
        return problems

    def _wanted(self, section: type[Section]) -> str:
        *most, last = [name for name, field in section.model_fields.items() if field.is_required()] or [""]
        if not last:
            return f"write {self.prefix}: {{}} for its defaults"
        return f"give {self.prefix}.{', '.join(most)} and {last}" if most else f"give {self.prefix}.{last}"

    def check_layout(self, model: ModelFields, block: Block, symbol: str, layout: Layout) -> Problems:
        """Return what is wrong with a layout of a model that has this block. Fields are whole paths."""
        return Problems()

    def context_note(self, model: ModelFields, block: Block, layout: Layout) -> str:
        """Return what a context parallel rank does with its slice, for the table of `--dry-run`."""
        return ""


def convolution_problems(title: str, taps: int, layout: Layout) -> Problems:
    """Return an error if a context parallel slice is shorter than what a causal convolution of `taps` looks back on."""
    problems, ranks = Problems(), layout.context_parallel_size
    back, tokens = taps - 1, layout.sequence_length // ranks
    if ranks > 1 and tokens < back:
        problems.add(
            "parallel.context_parallel_size",
            f"{ranks} leaves {tokens} tokens of a sequence on each rank, and {title}'s convolution looks back on {back}; the "
            f"largest that fits is {max(1, layout.sequence_length // back)}",
        )
    return problems


def block_problems(spec: MixerSpec, block: Block, path: str) -> Problems:
    """Return an error for each field of a block whose value the mixer does not implement. All norm placements are implemented:
    norms are around the mixer.
    """
    problems = Problems()
    for name in ("qk_norm", "output_gate", "partial_rotary_factor", "sliding_window", "mlp"):
        if spec.options.get(name) == ():
            continue
        choices = {getattr(known, name) for known in spec.blocks.values()} | {*spec.options.get(name, ())}
        value = getattr(block, name)
        if value not in choices:
            legal = " or ".join(shown(choice).strip(QUOTE) for choice in sorted(choices))
            problems.add(
                join(path, name), f"{shown(value).strip(QUOTE)} is not implemented for {spec.name}; set it to {legal}"
            )
    return problems


def layout_problems(spec: MixerSpec, model: ModelFields, block: Block, symbol: str, layout: Layout) -> Problems:
    """Return what is wrong with a layout of a model that has this block, features that the mixer lacks included."""
    problems = spec.check_layout(model, block, symbol, layout)
    title = f"{block.title} (layer_pattern's {symbol}) does not support it"
    if layout.context_parallel_size > 1 and "context_parallel" not in spec.supports:
        problems.add("parallel.context_parallel_size", f"{layout.context_parallel_size}: {title}; set it to 1")
    if layout.documents != "keep" and "documents" not in spec.supports:
        problems.add("data.documents", f"{layout.documents}: {title}; set it to keep")
    if layout.fp8 and "fp8" not in spec.supports:
        problems.add("precision.fp8_recipe", f"{title}; set it to null")
    if layout.cuda_graphs != "none" and "cuda_graphs" not in spec.supports:
        problems.add("train.cuda_graph_impl", f"{layout.cuda_graphs}: {title}; set it to none")
    return problems
