"""Choice of the modules that a run's layers are built from, by its configuration and the device."""

from importlib.util import find_spec

from megatron_hybrid.arch.model_fields import Backend as BackendName
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.mixers.backend import Backend
from megatron_hybrid.model.backends.local import LOCAL
from megatron_hybrid.precision.support import check_support


def choose_backend(name: BackendName, precision: PrecisionConfig, dtype: str) -> tuple[Backend, str]:
    """Return the backend of a run, and the reason for it.

    Raises:
        ConfigError: the run needs Transformer Engine, by name or for FP8, and it cannot run here.
    """
    installed = find_spec("transformer_engine") is not None
    obstacles = [
        (not has_cuda(), "no CUDA device is visible"),
        (not installed, "Transformer Engine is not installed (HYBRID_EXTRAS=dev,gpu source tools/env.sh)"),
        (dtype == "fp32", "train.dtype is fp32, which Transformer Engine multiplies in TF32"),
    ]
    obstacle = next((reason for there, reason in obstacles if there), None)
    if name == "local":
        return LOCAL, "model.backend = local"
    if obstacle is None:
        from megatron_hybrid.model.backends.transformer_engine import transformer_engine

        check_support(precision)
        reason = "model.backend = transformer_engine" if name != "auto" else "bf16 on a GPU"
        return transformer_engine(precision), reason
    if name == "transformer_engine":
        raise ConfigError.at("model.backend", f"transformer_engine cannot run: {obstacle}; set it to auto")
    if precision.fp8:
        raise ConfigError.at("precision.fp8_recipe", f"{precision.fp8_recipe} cannot run: {obstacle}; set it to null")
    return LOCAL, obstacle


def require_transformer_engine(field: str, name: BackendName, precision: PrecisionConfig, dtype: str) -> None:
    """Check that the layers of a run are built from Transformer Engine's modules.

    Args:
        field: the configuration field that needs them.

    Raises:
        ConfigError: they are not. The message gives the reason.
    """
    backend, reason = choose_backend(name, precision, dtype)
    if backend is LOCAL:
        raise ConfigError.at(
            field, f"true needs Transformer Engine's modules, which cannot run: {reason}; set it to false"
        )
