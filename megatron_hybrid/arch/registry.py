"""Registered mixers. To add one to this project, add its spec's module to BUILT_IN.

A plug-in, named by a run's `plugins`, calls `register` when it is imported.
"""

from collections.abc import Iterable
from functools import cache
from importlib import import_module

from megatron_hybrid.arch.blocks import Block, Blocks
from megatron_hybrid.arch.mixer import MixerSpec
from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import ConfigError, UserError
from megatron_hybrid.base.section import Section

BUILT_IN = (
    "megatron_hybrid.mixers.gated_delta_net.spec",
    "megatron_hybrid.mixers.attention.spec",
    "megatron_hybrid.mixers.kda.spec",
)
"""Imported on first use, by name, so that arch imports no mixer."""

_specs: dict[str, MixerSpec] = {}


def register(spec: MixerSpec) -> None:
    """Add a mixer.

    Raises:
        UserError: another mixer has its name, its section or one of its symbols.
    """
    if type(spec).__module__ not in BUILT_IN:
        mixer_specs()  # so that a name that a built-in mixer has is refused
    for other in _specs.values():
        if type(other) is type(spec):
            return
        shared = [
            word for word in (spec.name, spec.prefix, *spec.blocks) if word in (other.name, other.prefix, *other.blocks)
        ]
        if shared:
            raise UserError(
                f"plugins: mixers {other.name} ({other.module}) and {spec.name} ({spec.module}) both use {shared[0]}; rename it "
                "in one of them"
            )
    _specs[spec.name] = spec
    mixer_specs.cache_clear()
    default_blocks.cache_clear()


def import_plugins(names: Iterable[str]) -> None:
    """Import the modules that a run names in `plugins`, which register what they bring.

    Raises:
        ConfigError: one cannot be imported.
    """
    for index, name in enumerate(names):
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigError.at(
                f"plugins.{index}", f"{name} cannot be imported: {error}; install it, or add its folder to PYTHONPATH"
            ) from error


@cache
def mixer_specs() -> tuple[MixerSpec, ...]:
    """Return all registered mixers, built-in ones first."""
    for name in BUILT_IN:
        import_module(name)
    built_in = {type(spec).__module__: spec for spec in _specs.values()}
    first = [built_in[name] for name in BUILT_IN]
    return (*first, *(spec for spec in _specs.values() if spec not in first))


def mixer_spec(name: str) -> MixerSpec:
    """Return the mixer called `name`.

    Raises:
        ConfigError: there is none.
    """
    names = {spec.name: spec for spec in mixer_specs()}
    if name not in names:
        raise ConfigError.at(
            "mixer", f"{name} is not one of {', '.join(names)}; the nearest is {nearest.word(name, names)}"
        )
    return names[name]


@cache
def default_blocks() -> Blocks:
    """Return the blocks that all mixers bring, by layer_pattern symbol."""
    return {symbol: block for spec in mixer_specs() for symbol, block in spec.blocks.items()}


def first_blocks() -> dict[str, Block]:
    """Return the first block that each mixer brings, by the mixer's name."""
    return {spec.name: next(iter(spec.blocks.values())) for spec in mixer_specs()}


def decay_groups() -> tuple[str, ...]:
    """Return the groups that `train.optimizer.no_decay` may name."""
    return ("embedding", "norm", *(group for spec in mixer_specs() for group in spec.decay_groups))


def section_classes() -> dict[str, type[Section]]:
    """Return the sections that mixers add to `model`, by name."""
    return {spec.prefix: spec.config_class for spec in mixer_specs() if spec.config_class is not None}
