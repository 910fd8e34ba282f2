"""Transformer Engine's recipe objects."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from megatron_hybrid.arch.fp8_recipes import ATTENTION, Fp8Recipe


def transformer_engine_recipe(recipe: Fp8Recipe, **options: Any) -> Any:
    """Return Transformer Engine's object for a recipe.

    Args:
        options: arguments of its class.
    """
    from transformer_engine.common import recipe as recipes

    return getattr(recipes, recipe.transformer_engine_class)(**options)


@cache
def attention_recipe(amax_history_len: int) -> Any:
    """Return the recipe of FP8 attention: e4m3 forward and e5m2 backward. megatron-core has no field for it."""
    from transformer_engine.common.recipe import Format

    return transformer_engine_recipe(
        ATTENTION,
        fp8_format=Format.HYBRID,
        amax_history_len=amax_history_len,
        amax_compute_algo="max",
        fp8_dpa=True,
    )


def fp8_context(recipe: Fp8Recipe, **options: bool) -> Callable[[], AbstractContextManager[object]]:
    """Return the context factory in which Transformer Engine's modules run in FP8."""
    import transformer_engine.pytorch as te

    scaling = transformer_engine_recipe(recipe, **options)
    return lambda: te.fp8_autocast(enabled=True, fp8_recipe=scaling)
