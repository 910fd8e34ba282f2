"""Checks of train.optimizer against the engine, the layout and the precision."""

from collections.abc import Callable
from functools import partial

from megatron_hybrid.arch.optimizers import OPTIMIZERS, OptimizerFields
from megatron_hybrid.arch.optimizers.spec import OptimizerSpec
from megatron_hybrid.base.errors import Problems, join, shown
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.train import TrainConfig

SECTION = "train.optimizer"


def check_optimizer(
    train: TrainConfig, parallel: ParallelConfig, precision: PrecisionConfig, problems: Problems
) -> None:
    """Check that the optimizer runs with the engine, layout and precision, and that no field of another optimizer is set."""
    spec = OPTIMIZERS[train.optimizer.kind]
    _check_fields(spec, train, problems)
    if parallel.distributed_optimizer and train.engine == "megatron" and not spec.distributed:
        problems.add(
            f"{SECTION}.kind",
            f"{spec.name} does not run with parallel.distributed_optimizer; set that to false, or this to "
            f"{_others(lambda other: other.distributed)}",
        )
    for name, field, used, instead in (
        ("deepspeed", "train.engine", train.engine == "deepspeed", "megatron"),
        ("offload", f"{SECTION}.offload_fraction", train.optimizer.offload_fraction > 0, "0.0"),
        ("fp8_param_gather", "precision.fp8_param_gather", precision.fp8_param_gather, "false"),
    ):
        if used and (reason := spec.unsupported.get(name)):
            problems.add(
                f"{SECTION}.kind",
                f"{spec.name} does not run with {field}: {reason}; set that to {instead}, or this to "
                f"{_others(partial(_runs_with, name))}",
            )


def _check_fields(spec: OptimizerSpec, train: TrainConfig, problems: Problems) -> None:
    """Refuse values of fields that only another optimizer reads."""
    own = spec.config_class.model_fields if spec.config_class else {}
    for name, field in OptimizerFields.model_fields.items():
        value = getattr(train.optimizer, name)
        if name not in own and value != field.default:
            readers = " or ".join(
                other.name
                for other in OPTIMIZERS.values()
                if other.config_class and name in other.config_class.model_fields
            )
            problems.add(
                join(SECTION, name),
                f"{shown(value)} has no meaning with {SECTION}.kind = {spec.name}; set that to {readers}, or leave this out",
            )


def _runs_with(feature: str, spec: OptimizerSpec) -> bool:
    return feature not in spec.unsupported


def _others(fits: Callable[[OptimizerSpec], bool]) -> str:
    return " or ".join(name for name, spec in OPTIMIZERS.items() if fits(spec))
