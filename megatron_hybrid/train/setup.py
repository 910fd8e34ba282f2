"""Builds what the trainer needs besides the engine: data loaders, validation sets, the logger and the saved configuration."""

from collections.abc import Mapping
from itertools import count
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.arch.flops import training_flops_per_token
from megatron_hybrid.arch.fp8_recipes import FP8_SPEEDUP
from megatron_hybrid.config.load import dump_run
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.attended_length import blend_attended_length
from megatron_hybrid.data.blend import Blend
from megatron_hybrid.data.loader import BatchLoader
from megatron_hybrid.data.text_bytes import TextBytes
from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.evaluation.validation_set import ValidationSet
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.observe import RunLogger
from megatron_hybrid.train.progress import Progress


def build_loader(config: RunConfig, groups: ProcessGroupCollection, data: Blend, num_workers: int) -> BatchLoader:
    """Build the loader of this rank's micro-batches."""
    return BatchLoader(
        data,
        config.train.micro_batch_size,
        data_parallel_rank=groups.dp.rank(),
        data_parallel_size=groups.dp.size(),
        num_workers=num_workers,
        pin_memory=has_cuda(),
    )


def build_validation_sets(
    config: RunConfig, groups: ProcessGroupCollection, blends: Mapping[str, Blend], text_bytes: TextBytes
) -> list[ValidationSet]:
    """Build the validation sets of this rank."""
    train = config.train
    unit = train.micro_batch_size * groups.dp.size()
    if (
        config.parallel.virtual_pipeline_parallel_size > 1
    ):  # the interleaved schedule needs whole rounds of micro-batches
        unit *= config.parallel.pipeline_parallel_size
    found = []
    for name, blend in blends.items():
        samples = blend.samples_without_repeats()
        if train.eval_batches is not None:
            samples = min(samples, train.eval_batches * train.global_batch_size)
        sizes = (train.micro_batch_size, train.global_batch_size, unit)
        found.append(ValidationSet(name, blend, samples, groups, *sizes, text_bytes))
    return found


def find_text_bytes(config: RunConfig) -> TextBytes:
    """Return the bytes of text of each token, if validation sets need them. Call it on one rank."""
    sources = [source for sources in config.data.validation.values() for source in sources]
    if config.train.eval_interval is None:
        return TextBytes(None, "there are no evaluations")
    if any(source.generator is not None for source in sources):
        return TextBytes(None, "validation sets are generated as tokens")
    paths = [source.path for source in sources]
    return TextBytes.of(config.data.tokenizer, config.model.vocab_size, paths)


def build_logger(config: RunConfig, launch: Launch, training: Blend, progress: Progress, continues: bool) -> RunLogger:
    """Build the logger of a run, which writes on the first rank only.

    Args:
        training: blend that training reads, whose documents determine the FLOPs of attention.
        progress: progress of the checkpoint that the run starts from.
        continues: whether the earlier logs in run_dir belong to this run.
    """
    return RunLogger(
        config.logging,
        config.run_dir,
        launch.rank,
        total_steps=config.train.steps,
        start_step=progress.step,
        start_tokens=progress.tokens,
        flops_per_token=training_flops_per_token(config.model, max(1, round(blend_attended_length(training)))),
        num_devices=launch.world_size,
        device_name=torch.cuda.get_device_name() if has_cuda() else None,
        format_speedup=_format_speedup(config),
        settings=config.model_dump(mode="json"),
        continues=continues,
    )


def _format_speedup(config: RunConfig) -> float | None:
    """Return the peak of the linears' format over that of bf16. None: unknown."""
    if config.precision.fp8:
        return FP8_SPEEDUP
    return 1.0 if config.train.dtype == "bf16" else None


def write_config(config: RunConfig, step: int) -> None:
    """Write the resolved configuration to run_dir: `config.yaml`, and `config-<step>.yaml`, which later starts keep.

    A start at the same step with another configuration gets a name of its own: `config-<step>-2.yaml`. Call it on one rank. A failure
    is reported and does not end the run, which does not read these files.

    Args:
        step: step that the run starts after.
    """
    try:
        _write_config(Path(config.run_dir), dump_run(config), step)
    except OSError as error:
        print(f"run_dir: config.yaml cannot be written: {error.strerror}; the run continues without it", flush=True)


def _write_config(run_dir: Path, text: str, step: int) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(text)
    for number in count(1):
        path = run_dir / f"config-{step:08d}{f'-{number}' if number > 1 else ''}.yaml"
        if not path.exists():
            path.write_text(text)
        if path.read_text() == text:
            return
