"""Optimizer bytes and FP8 facts follow their tables."""

from dataclasses import replace

import pytest

from megatron_hybrid.arch.fp8_recipes import FP8_RECIPES
from megatron_hybrid.arch.optimizers import OPTIMIZERS, adamw
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.planner.hardware import load
from megatron_hybrid.planner.memory import fullest
from megatron_hybrid.planner.timing import StepPredictor
from tests.planner.test_memory import plan


def test_an_optimizer_with_fewer_states_takes_less_memory_and_time(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "momentum", replace(adamw.SPEC, name="momentum", states=("exp_avg",)))
    two, one = plan(gpus=1), replace(plan(gpus=1), optimizer="momentum")
    parameters = fullest(two).optimizer / 12
    assert fullest(two).optimizer - fullest(one).optimizer == pytest.approx(4 * parameters, rel=1e-6)
    offloaded = (fullest(replace(some, offload_fraction=1.0)).host for some in (two, one))
    assert [size / parameters for size in offloaded] == pytest.approx([16, 12], rel=1e-5)
    predictor = StepPredictor(load("h100-80gb"))
    slower, faster = (predictor.step(some).parts["optimizer"] for some in (two, one))
    moved = predictor.hardware.copy_seconds("other", 8 * parameters)
    assert slower - faster == pytest.approx(moved, rel=1e-3)


def test_a_recipe_with_one_copy_of_weights_takes_half(monkeypatch):
    tensorwise = FP8_RECIPES["tensorwise"]
    in_fp8 = replace(plan(2), precision=PrecisionConfig(fp8_recipe="tensorwise"))
    two = fullest(in_fp8).fp8_weights
    monkeypatch.setitem(FP8_RECIPES, "tensorwise", replace(tensorwise, weight_copy_bytes=1))
    assert fullest(in_fp8).fp8_weights == two / 2
