"""Sizes that FP8 asks for, over the tensor parallel ranks."""

from typing import TYPE_CHECKING

from megatron_hybrid.arch.packing import round_up
from megatron_hybrid.arch.registry import default_blocks, mixer_spec
from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import Problems

if TYPE_CHECKING:
    from megatron_hybrid.config.run import RunConfig


def check_precision(run: "RunConfig", problems: Problems) -> None:
    """What `precision` asks of the model, the batch and train.dtype."""
    precision, recipe = run.precision, run.precision.recipe
    if recipe is None:
        return
    if run.train.dtype == "fp32":
        problems.add(
            "precision.fp8_recipe", f"{precision.fp8_recipe} needs train.dtype bf16; set that, or this to null"
        )
    if run.model.backend == "local":
        problems.add(
            "precision.fp8_recipe",
            f"{precision.fp8_recipe} needs Transformer Engine; set model.backend to auto, or this to null",
        )
    if precision.fp8_param_gather and not run.parallel.distributed_optimizer:
        problems.add(
            "precision.fp8_param_gather",
            "true needs parallel.distributed_optimizer, the one that casts its fp32 weights to FP8; set that to true, or this to "
            "false",
        )
    _check_widths(run, recipe.alignment, problems)
    _check_attention(run, problems)
    layers, model = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16, run.model
    if layers >= model.num_layers:
        problems.add(
            "precision.num_layers_at_start_in_bf16",
            f"with num_layers_at_end_in_bf16, {layers} of {model.num_layers} layers are in bf16; lower them, or set fp8_recipe to "
            "null",
        )


def _check_widths(run: "RunConfig", unit: int, problems: Problems) -> None:
    """Check that rows and columns of every FP8 matrix on a rank are multiples of `unit`."""
    model, ranks = run.model, run.parallel.tensor_parallel_size
    if model.hidden_size % unit:
        _add(problems, "model.hidden_size", model.hidden_size, unit, 1)
    if model.ffn_hidden_size % (unit * ranks) and model.ffn_hidden_size % ranks == 0:
        _add(problems, "model.ffn_hidden_size", model.ffn_hidden_size, unit, ranks)
    for block in model.blocks_by_symbol.values():
        spec = mixer_spec(block.mixer)
        groups = spec.head_groups(model, block)
        for parameter in spec.parameters(model, block):
            width = parameter.rank_shape(ranks)[-1]
            if parameter.split == "columns" and width % unit:
                _heads(problems, groups.width_field, groups.width, unit, width)
    context = run.parallel.context_parallel_size
    shared = context * (ranks if run.parallel.sequence_parallel_on else 1)
    tokens = run.data.sequence_length * run.train.micro_batch_size
    if tokens % (unit * shared):
        kinds = "context and sequence" if context > 1 else "sequence"
        words = "tokens a micro-batch" + (f" over {shared} {kinds} parallel ranks" if shared > 1 else "")
        problems.add(
            "data.sequence_length",
            f"{run.data.sequence_length} makes {tokens} {words}, and FP8 takes them in multiples of {unit}; the nearest is "
            f"{nearest.multiple(run.data.sequence_length, unit * shared)}",
        )


def _add(problems: Problems, field: str, value: int, alignment: int, ranks: int) -> None:
    unit = alignment * ranks
    words = f"{alignment} x tensor_parallel_size {ranks} = {unit}" if ranks > 1 else str(unit)
    problems.add(
        field,
        f"{value} is not a multiple of {words}, as FP8 needs; the nearest is {nearest.multiple(value, unit)}, or set "
        "precision.fp8_recipe to null",
    )


def _heads(problems: Problems, field: str, value: int, alignment: int, width: int) -> None:
    problems.add(
        field,
        f"{value} makes a rank's heads {width} wide, and FP8 takes multiples of {alignment}; the nearest that always fits "
        f"is {round_up(value, alignment)}, or set precision.fp8_recipe to null",
    )


def _check_attention(run: "RunConfig", problems: Problems) -> None:
    if not run.precision.fp8_attention:
        return
    if not any("fp8_attention" in mixer_spec(block.mixer).supports for block in run.model.blocks_by_symbol.values()):
        known = [s for s, block in default_blocks().items() if "fp8_attention" in mixer_spec(block.mixer).supports]
        problems.add(
            "precision.fp8_attention",
            f"true has no layer to run in: layer_pattern has neither {' nor '.join(known)}; set it to false",
        )
