"""Run configurations that the planner reads and writes."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_hybrid.arch.fp8_recipes import RECOMMENDED
from megatron_hybrid.base import yaml_text
from megatron_hybrid.base.errors import ConfigError, shown
from megatron_hybrid.config import presets
from megatron_hybrid.config.command_line import read_yaml
from megatron_hybrid.config.extends import read_extended
from megatron_hybrid.config.load import load_run
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.planner.plan import Plan

PLACEHOLDERS = {"run_dir": "runs/planned", "data.train": [{"path": "data/train"}], "train.steps": 1000}
"""Values of fields that a run needs and that nothing states. `comment` names them in the file that is written."""
AI2_TOKENS = 5_930_000_000_000
"""Tokens of AI2's pretraining runs of 7B."""
_AI2 = {"data.tokenizer": "tokenizers/dolma2", "train.schedule.kind": "cosine", "train.schedule.warmup_steps": 2000}
RECIPES: Mapping[str, Mapping[str, object]] = {"olmo_hybrid_7b": _AI2, "olmo3_7b": _AI2}
"""Fields of the published recipes that differ from the defaults, for presets that are named without a run."""


def load_base_run(
    name_or_path: str,
    sequence_length: int | None,
    global_batch_size: int | None,
    precision: str | None,
    documents: str | None = None,
) -> RunConfig:
    """Load the run to plan for.

    Args:
        name_or_path: name of a preset, YAML file with a model's fields, or YAML file of a whole run. A run keeps its data, training
            and precision, and its parallel.tp_comm_overlap for the layouts that support it.
        sequence_length, global_batch_size: override the run's.
        precision: bf16, fp8 (the recommended recipe) or an FP8 recipe; overrides the run's.
        documents: overrides data.documents.

    Raises:
        ConfigError: any of them is wrong.
    """
    data: dict[str, Any] = {}
    path, overlap = Path(name_or_path), False
    if path.suffix in (".yaml", ".yml") and path.is_file():
        data, overlap = _read(path)
    elif name_or_path in (*presets.SIZED, *presets.UNSIZED):
        data = {"model": name_or_path}
    else:
        load_run(name_or_path)  # raises, with the presets in the message
    overrides = _overrides(data, sequence_length, global_batch_size, precision)
    run = _load(data, [*overrides, *([f"data.documents={documents}"] if documents else [])])
    if run.train.engine != "megatron":
        raise ConfigError.at(
            "train.engine",
            f"{run.train.engine} cannot be planned: rates and layouts are those of megatron-core. Its only degrees are "
            "parallel.tensor_parallel_size, zero.stage and what zero offloads; choose them by hand; or set train.engine to "
            "megatron and leave zero out",
        )
    # not validated: without tensor parallelism there is nothing to overlap yet
    return run.model_copy(update={"parallel": run.parallel.model_copy(update={"tp_comm_overlap": overlap})})


def _overrides(
    data: Mapping[str, Any], sequence_length: int | None, global_batch_size: int | None, precision: str | None
) -> list[str]:
    """Return overrides that complete a run and apply the arguments."""
    stated = dict(_recipe(data, sequence_length, global_batch_size))
    missing = PLACEHOLDERS | stated
    overrides = [f"{key}={yaml_text.write(value).strip()}" for key, value in missing.items() if _absent(data, key)]
    given = {"data.sequence_length": sequence_length, "train.global_batch_size": global_batch_size}
    for key, value in given.items():
        if value is not None:
            overrides.append(f"{key}={value}")
        elif _absent(data, key):
            option = "--" + key.split(".")[1].replace("_", "-")
            raise ConfigError.at(key, f"is missing; give {option}, or a run's YAML file that has it")
    if precision is not None:
        overrides.append(f"precision.fp8_recipe={_RECIPES.get(precision, precision.removeprefix('fp8_'))}")
    return overrides


def _read(path: Path) -> tuple[dict[str, Any], bool]:
    """Return a file's sections, and its parallel.tp_comm_overlap. A model's fields become the section `model`."""
    read = read_extended(str(path), _read_one)
    if "model" not in read:
        return {"model": read}, False
    parallel = read.get("parallel")
    return read, isinstance(parallel, dict) and bool(parallel.get("tp_comm_overlap"))


def _read_one(path: str) -> dict[str, Any]:
    read = read_yaml("model", Path(path))
    if not isinstance(read, dict):
        raise ConfigError.at(path, f"holds {shown(read)}; write a model's fields, or a run's sections")
    return read


def _recipe(
    data: Mapping[str, Any], sequence_length: int | None, global_batch_size: int | None
) -> Iterator[tuple[str, object]]:
    """Yield the fields of the published recipe of a preset that is named without a run."""
    model = data.get("model")
    if set(data) != {"model"} or not isinstance(model, str) or model not in RECIPES:
        return
    yield from RECIPES[model].items()
    if sequence_length and global_batch_size:
        yield "train.steps", round(AI2_TOKENS / (sequence_length * global_batch_size))


def comment(name_or_path: str) -> str:
    """Return the first lines of the file of a planned run: the fields that hold placeholders."""
    path = Path(name_or_path)
    data = _read(path)[0] if path.suffix in (".yaml", ".yml") else {"model": name_or_path}
    stated = dict(_recipe(data, 1, 1))
    names = [key for key in PLACEHOLDERS if _absent(data, key) and key not in stated]
    text = (
        f"# Placeholders, because {name_or_path} does not state them: {', '.join(names)}. Replace them.\n"
        if names
        else ""
    )
    return f"# Layout by megatron-hybrid plan for {name_or_path}.\n{text}"


_RECIPES = {"bf16": "null", "fp8": RECOMMENDED.name}


def _absent(data: Mapping[str, Any], key: str) -> bool:
    section, _, name = key.partition(".")
    inner = data.get(section)
    if name and inner is not None and not isinstance(inner, dict):
        raise ConfigError.at(section, f"{shown(inner)} is no section; write its fields, as in {key}: ...")
    return section not in data if not name else name.partition(".")[0] not in (inner or {})


def _load(data: dict[str, Any], overrides: list[str]) -> RunConfig:
    """Load sections with `load_run`, so that presets, overrides and errors are the trainer's. The layout is left out."""
    data = {key: value for key, value in data.items() if key != "parallel"}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(yaml_text.write(data))
        file.flush()
        return load_run(file.name, overrides)


def apply_plan(run: RunConfig, plan: Plan) -> RunConfig:
    """Return the run with the plan's layout, checked as the trainer checks it."""
    data = run.model_dump(mode="json")
    data["parallel"] = plan.parallel.model_dump(mode="json") | {"sequence_parallel": plan.parallel.sequence_parallel}
    data["train"]["micro_batch_size"] = plan.micro_batch_size
    found = RunConfig.model_validate(data)
    found.check_world(plan.world_size)
    return found
