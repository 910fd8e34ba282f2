"""Fields of Muon: names, defaults and choices are upstream's, and what it does not run with is an error before a run starts."""

import pytest

from megatron_hybrid.arch.optimizers.muon import MuonFields
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.load import load_run
from megatron_hybrid.train.optimizers import muon as implementation
from testing.muon import NOT_HERE, REASON
from tests.config.wrong_runs import TINY, ZERO, Case, assert_named, each

MUON = ["train.optimizer.kind=muon"]
OFFLOAD = ["train.optimizer.offload_fraction=0.5"]
FP8 = ["precision.fp8_recipe=tensorwise", "precision.fp8_param_gather=true", "model.gdn.value_head_dim=64"]

WRONG: list[Case] = [
    (["train.optimizer.kind=moun"], "train.optimizer.kind", "not one of adamw, muon", "the nearest is muon"),
    (
        [*MUON, *ZERO],
        "train.optimizer.kind",
        "does not run with train.engine",
        "set that to megatron, or this to adamw",
    ),
    ([*MUON, *OFFLOAD], "train.optimizer.kind", "offload_fraction", "set that to 0.0, or this to adamw"),
    ([*MUON, *FP8], "train.optimizer.kind", "precision.fp8_param_gather", "set that to false, or this to adamw"),
    (["train.optimizer.muon_momentum=0.9"], "train.optimizer.muon_momentum", "no meaning with", "set that to muon"),
    (["train.optimizer.muon_tp_mode=blockwise"], "train.optimizer.muon_tp_mode", "kind = adamw", "leave this out"),
    ([*MUON, "train.optimizer.muon_momentum=1.0"], "train.optimizer.muon_momentum", "less than 1", "smaller"),
    ([*MUON, "train.optimizer.muon_num_ns_steps=0"], "train.optimizer.muon_num_ns_steps", "greater than 0", "1"),
    ([*MUON, "train.optimizer.muon_scale_mode=rms"], "train.optimizer.muon_scale_mode", "spectral, shape", "nearest"),
    (
        [*MUON, "train.optimizer.muon_coefficient_type=custom"],
        "train.optimizer.muon_coefficient_type",
        "simple",
        "near",
    ),
    ([*MUON, "train.optimizer.betas=[0.9, 1.0]"], "train.optimizer.betas", "below 1", "give"),
]


@each(WRONG)
def test_error(overrides, field, wrong, remedy):
    assert_named(overrides, field, wrong, remedy)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.dtype=fp32"],
        ["parallel.tensor_parallel_size=2", "train.optimizer.muon_tp_mode=distributed"],
        ["parallel.distributed_optimizer=false"],
        ["precision.fp8_recipe=tensorwise", "model.gdn.value_head_dim=64"],
        ["train.optimizer.muon_coefficient_type=polar_express", "train.optimizer.muon_num_ns_steps=8"],
    ],
)
def test_combinations_that_run(overrides):
    assert load_run(None, [*TINY, *MUON, *overrides]).train.optimizer.kind == "muon"


def test_a_missing_package_names_the_field(monkeypatch):
    monkeypatch.setattr(implementation.upstream, "HAVE_EMERGING_OPTIMIZERS", False)
    with pytest.raises(ConfigError, match="train.optimizer.kind: muon needs .* pip install 'emerging-optimizers"):
        implementation.make_known()


def test_defaults_are_those_of_megatron_core():
    from megatron.core.optimizer import OptimizerConfig

    theirs = OptimizerConfig()
    for name, field in MuonFields.model_fields.items():
        if name != "muon_tp_mode":  # megatron-core's default, blockwise, depends on the layout
            assert getattr(theirs, name) == field.default, name


@pytest.mark.skipif(NOT_HERE, reason=REASON)
def test_choices_are_those_of_emerging_optimizers():
    from typing import get_args

    from emerging_optimizers.orthogonalized_optimizers.muon import MuonScaleT
    from megatron.core.optimizer.emerging_optimizers import get_supported_coefficient_types

    ours = {name: set(get_args(field.annotation)) for name, field in MuonFields.model_fields.items()}
    assert ours["muon_coefficient_type"] == set(get_supported_coefficient_types()) - {"custom"}
    assert ours["muon_scale_mode"] == set(get_args(MuonScaleT))
