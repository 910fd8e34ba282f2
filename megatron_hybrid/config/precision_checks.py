"""Checks of FP8 against model, data, training and layout."""

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.packing import round_up
from megatron_hybrid.arch.registry import default_blocks, mixer_spec
from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import Problems
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.train import TrainConfig


def check_precision(
    model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, precision: PrecisionConfig, problems: Problems
) -> None:
    """Check backend, data type, optimizer, attention and the number of layers in bf16."""
    if not precision.fp8:
        return
    if train.dtype == "fp32":
        problems.add(
            "precision.fp8_recipe", f"{precision.fp8_recipe} needs train.dtype bf16; set that, or this to null"
        )
    if model.backend == "local":
        problems.add(
            "precision.fp8_recipe",
            f"{precision.fp8_recipe} needs Transformer Engine; set model.backend to auto, or this to null",
        )
    if precision.fp8_param_gather and not parallel.distributed_optimizer:
        problems.add(
            "precision.fp8_param_gather",
            "true needs parallel.distributed_optimizer, which casts its fp32 weights to FP8; set that to true, or this to false",
        )
    if precision.fp8_attention:
        _check_attention(model, problems)
    layers = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
    if layers >= model.num_layers:
        problems.add(
            "precision.num_layers_at_start_in_bf16",
            f"with num_layers_at_end_in_bf16, {layers} of {model.num_layers} layers are in bf16; lower them, or set fp8_recipe to "
            "null",
        )


def _check_attention(model: ModelConfig, problems: Problems) -> None:
    """Check that a layer supports it. Each mixer checks its own rules (`MixerSpec.check_layout`)."""
    if not any("fp8_attention" in mixer_spec(block.mixer).supports for block in model.blocks_by_symbol.values()):
        known = [s for s, block in default_blocks().items() if "fp8_attention" in mixer_spec(block.mixer).supports]
        problems.add(
            "precision.fp8_attention",
            f"true has no layer to run in: layer_pattern has neither {' nor '.join(known)}; set it to false",
        )


def check_fp8_sizes(
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    problems: Problems,
) -> None:
    """Check that rows and columns of every FP8 GEMM on a rank are multiples of the recipe's alignment."""
    if precision.recipe is None:
        return
    unit = precision.recipe.alignment
    _check_widths(model, unit, parallel.tensor_parallel_size, problems)
    context = parallel.context_parallel_size
    shared = context * (parallel.tensor_parallel_size if parallel.sequence_parallel_on else 1)
    tokens = data.sequence_length * train.micro_batch_size
    if tokens % (unit * shared):
        kinds = "context and sequence" if context > 1 else "sequence"
        words = "tokens per micro-batch" + (f" over {shared} {kinds} parallel ranks" if shared > 1 else "")
        best = nearest.multiple(data.sequence_length, unit * shared)
        problems.add(
            "data.sequence_length",
            f"{data.sequence_length} makes {tokens} {words}, and FP8 needs a multiple of {unit} on each; the nearest is "
            f"{best}",
        )


def _check_widths(model: ModelConfig, unit: int, ranks: int, problems: Problems) -> None:
    if model.hidden_size % unit:
        _add_width(problems, "model.hidden_size", model.hidden_size, unit, 1)
    if model.ffn_hidden_size % (unit * ranks) and model.ffn_hidden_size % ranks == 0:
        _add_width(problems, "model.ffn_hidden_size", model.ffn_hidden_size, unit, ranks)
    for block in model.blocks_by_symbol.values():
        spec = mixer_spec(block.mixer)
        groups = spec.head_groups(model, block)
        widths = [p.rank_shape(ranks)[p.dim] for p in spec.parameters(model, block) if p.is_gemm]
        if width := next((width for width in widths if width % unit), None):
            _add_head_dim(problems, groups.width_field, groups.width, unit, width)


def _add_width(problems: Problems, field: str, value: int, alignment: int, ranks: int) -> None:
    unit = alignment * ranks
    words = f"{alignment} x tensor_parallel_size {ranks} = {unit}" if ranks > 1 else str(unit)
    problems.add(
        field,
        f"{value} is not a multiple of {words}, as FP8 needs; the nearest is {nearest.multiple(value, unit)}, or set "
        "precision.fp8_recipe to null",
    )


def _add_head_dim(problems: Problems, field: str, value: int, alignment: int, width: int) -> None:
    problems.add(
        field,
        f"{value} makes the heads of a rank {width} wide, and FP8 needs a multiple of {alignment}; the nearest that always fits "
        f"is {round_up(value, alignment)}, or set precision.fp8_recipe to null",
    )
