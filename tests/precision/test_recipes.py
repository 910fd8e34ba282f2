"""The table of FP8 recipes: one entry is all that a recipe needs."""

from dataclasses import fields, replace

import pytest
from megatron.core.enums import Fp8Recipe as MegatronRecipe

from megatron_hybrid.arch.fp8_recipes import FP8_RECIPES, RECOMMENDED
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.load import load_run
from tests.config.wrong_runs import TINY


def test_megatron_core_knows_every_recipe():
    assert set(FP8_RECIPES) <= {recipe.value for recipe in MegatronRecipe}


def test_the_recommended_recipe_has_no_restriction():
    defaults = {field.name: field.default for field in fields(RECOMMENDED)}
    assert RECOMMENDED.user_buffers and RECOMMENDED.bf16_layers
    assert RECOMMENDED.support_check == defaults["support_check"]


@pytest.fixture
def toy(monkeypatch):
    """A recipe that is in the table only: sizes in multiples of 64, without user buffers and bf16 layers."""
    recipe = replace(RECOMMENDED, name="toy", alignment=64, user_buffers=False, bf16_layers=False)
    monkeypatch.setitem(FP8_RECIPES, "toy", recipe)
    return recipe


def precision_with(recipe: str, **more):
    from megatron_hybrid.config.precision import PrecisionConfig

    return PrecisionConfig.model_construct(**PrecisionConfig().model_dump() | {"fp8_recipe": recipe} | more)


def test_the_checks_follow_the_table(toy):

    run = load_run(None, [*TINY, "precision.fp8_recipe=tensorwise", "model.ffn_hidden_size=416"])
    run = run.model_copy(update={"precision": precision_with("toy")})
    wide = [message for field, message in run.section_problems() if field == "model.ffn_hidden_size"]
    assert len(wide) == 1 and "416 is not a multiple of 64" in wide[0]
    overlap = run.parallel.model_copy(update={"tp_comm_overlap": True})
    problems = run.model_copy(update={"parallel": overlap}).section_problems()
    assert any("cannot exchange toy FP8" in message for _, message in problems)
    with pytest.raises(ConfigError, match="num_layers_at_end_in_bf16: 1 has no meaning with fp8_recipe = toy"):
        precision_with("toy", num_layers_at_end_in_bf16=1)._check()


def test_a_name_outside_the_table_is_refused():
    with pytest.raises(ConfigError, match="not one of delayed, tensorwise, blockwise"):
        load_run(None, [*TINY, "precision.fp8_recipe=mxfp9"])
