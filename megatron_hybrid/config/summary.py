"""Summary of a run in a few lines of at most 80 columns, which a run prints at its start. No torch here."""

import textwrap
from collections.abc import Sequence

from megatron_hybrid.arch import flops
from megatron_hybrid.arch.model import fold_pattern
from megatron_hybrid.config.run import RunConfig

WIDTH = 80
_LABEL = 12


def summary(config: RunConfig, world_size: int, device: str, epochs: Sequence[float], memory: str | None) -> list[str]:
    """Return the lines.

    Args:
        device: name of the ranks' device.
        epochs: epochs of each training source by the last step; empty for generators, which have none.
        memory: expected memory per GPU; None: it is not predicted.
    """
    entries = {
        "run folder": config.run_dir,
        "model": _model(config),
        "ranks": f"{world_size} on {device}",
        "layout": _layout(config, world_size),
        "step": _step(config, world_size),
        "steps": _steps(config, epochs),
        "precision": _precision(config),
        "memory": memory,
    }
    return [line for name, text in entries.items() if text for line in _entry(name, text)]


def _entry(name: str, text: str) -> list[str]:
    indent = " " * _LABEL
    return textwrap.wrap(
        text, WIDTH, initial_indent=name.ljust(_LABEL), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )  # fmt: skip


def _model(config: RunConfig) -> str:
    model = config.model
    size = short_number(flops.count_parameters(model))
    return (
        f"{size} parameters, {model.num_layers} layers {fold_pattern(model.layers)}, width {model.hidden_size:,}, "
        f"vocabulary {model.vocab_size:,}"
    )


def _layout(config: RunConfig, world_size: int) -> str:
    parallel = config.parallel
    virtual = parallel.virtual_pipeline_parallel_size
    degrees = [
        ("TP", parallel.tensor_parallel_size, " with SP" if parallel.sequence_parallel_on else ""),
        ("CP", parallel.context_parallel_size, ""),
        ("PP", parallel.pipeline_parallel_size, f" with VPP{virtual}" if virtual > 1 else ""),
        ("DP", parallel.data_parallel_size(world_size), _sharding(config)),
    ]
    return " x ".join(f"{name}{size}{note}" for name, size, note in degrees if size > 1) or "one rank"


def _sharding(config: RunConfig) -> str:
    if config.train.engine == "deepspeed":
        return f" with DeepSpeed's ZeRO {config.zero.stage}"
    return " with a distributed optimizer" if config.parallel.distributed_optimizer else ""


def _step(config: RunConfig, world_size: int) -> str:
    train, length = config.train, config.data.sequence_length
    size, data_ranks = train.global_batch_size, config.parallel.data_parallel_size(world_size)
    batches = size // (train.micro_batch_size * data_ranks)
    return (
        f"{size:,} sequences x {length:,} = {size * length:,} tokens; per rank {batches:,} micro-batches of "
        f"{train.micro_batch_size}"
    )


def _steps(config: RunConfig, epochs: Sequence[float]) -> str:
    train = config.train
    tokens = train.samples_after(train.steps) * config.data.sequence_length
    shown = ", ".join(f"{value:.3g} of data.train.{number}" for number, value in enumerate(epochs))
    return f"{train.steps:,}, {tokens:,} tokens" + (f"; epochs: {shown}" if shown else "")


def _precision(config: RunConfig) -> str:
    recipe = config.precision.fp8_recipe
    fp8 = f" with fp8 {recipe} linears" if recipe else ""
    return f"{config.train.dtype}{fp8}; optimizer {config.train.optimizer.kind}"


def short_number(value: float) -> str:
    """Return a number with three digits and a suffix: `7.43 B`, `1.93 M`."""
    for limit, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= limit * 0.9995:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"
