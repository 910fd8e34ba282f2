"""Checks of all stages before the first one runs: `--dry-run`. Uses no torch."""

from collections.abc import Sequence
from pathlib import Path

from megatron_hybrid.base.errors import ConfigError, Problems, UserError
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.vocabulary import vocabulary_identity
from megatron_hybrid.stages.plan import Training, Work
from megatron_hybrid.train.changes import config_changes
from megatron_hybrid.train.dry_run import check_files
from megatron_hybrid.train.start import check_stage


def check_work(work: Sequence[Work], world_size: int | None, files: str) -> list[str]:
    """Check every run, its files, and that it can start from the stage before it. Return the lines to print.

    Args:
        world_size: number of ranks; None: do not check whether layouts fit.
        files: `warn`: report files that are not on this machine; `require`: they are errors; `skip`: do not look for files.

    Raises:
        ConfigError: every problem of every stage, with the stage's name.
    """
    problems, lines, models = Problems(), list[str](), dict[str, RunConfig]()
    for item in work:
        if isinstance(item, Training):
            lines += _check_training(item, models, world_size, files, problems)
        else:
            lines.append(f"{item.name}: {item.state}; of {', '.join(item.needs)}")
            models[item.name] = models[item.needs[0]]
    problems.raise_if_any()
    return lines


def _check_training(
    stage: Training, models: dict[str, RunConfig], world_size: int | None, files: str, problems: Problems
) -> list[str]:
    run = models[stage.name] = stage.run()
    tokens = run.train.samples_after(run.train.steps) * run.data.sequence_length
    lines = [f"{stage.name}: {stage.state}; {run.train.steps:,} steps, {tokens:,} tokens, from {_origin(stage)}"]
    try:
        if world_size:
            run.check_world(world_size)
        if files != "skip" and not stage.done:
            lines += [f"  {line}" for line in check_files(run, world_size or 1, files == "require")]
        if stage.needs:
            before = models[stage.needs[0]]
            check_stage(Path(before.run_dir), before.model, vocabulary_identity(before), run)
            changes = config_changes(before.model_dump(mode="json"), run.model_dump(mode="json"))
            lines += [f"  {field} {text}" for field, text in changes.items() if field != "run_dir"]
    except ConfigError as error:
        problems += [(f"{stage.name}: {field}", text) for field, text in error.problems]
    except UserError as error:
        problems.add(stage.name, str(error))
    return lines


def _origin(stage: Training) -> str:
    take = next((text.partition("=")[2] for text in stage.start if text.startswith("checkpoint.take=")), "")
    return f"the {take} of {stage.needs[0]}" if stage.needs else "initial weights"
