"""YaRN in every form of config.json, and under every layout."""

import copy

import pytest
import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf.config import hf_from_model, model_from_hf, read_config
from megatron_hybrid.convert.olmo_core.config import model_from_olmo_core
from megatron_hybrid.convert.verify import verify
from testing import jobs
from tests.convert.folders import BASE, OLMO3, YARN, edit_json, write_folder
from tests.convert.olmo_core_files import olmo_core_config
from tests.convert.test_huggingface import to_ours

MODEL = OLMO3 | dict(rope_scaling=YARN)
ATTENTION_FACTOR = 1.2079441541679836
RELEASED = {
    "attention_factor": ATTENTION_FACTOR,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "rope_type": "yarn",
}
PLAIN = {"rope_type": "default", "rope_theta": 500000}
FULL = PLAIN | RELEASED
FORMS = {
    "4.57": dict(rope_theta=500000, rope_scaling=RELEASED),
    "4.57, old name": dict(rope_theta=5e5, rope_scaling={"type": "yarn", "factor": 8, "original_max_position_embeddings": 16}),
    "5.0": dict(rope_parameters=FULL),
    "5.13": dict(rope_parameters={"full_attention": FULL, "sliding_attention": PLAIN}),
    "5.13, theta outside": dict(rope_theta=5e5, rope_parameters={"full_attention": RELEASED, "sliding_attention": {}}),
    "all": dict(rope_theta=5e5, rope_scaling=RELEASED, rope_parameters={"full_attention": FULL, "sliding_attention": PLAIN}),
    "scaling added by hand": dict(rope_scaling=RELEASED, rope_parameters={"full_attention": PLAIN, "sliding_attention": PLAIN}),
    "mscale": dict(rope_theta=5e5, rope_scaling=RELEASED | dict(attention_factor=None, mscale=1.0, mscale_all_dim=0.0)),
    "nulls": dict(rope_theta=5e5, rope_scaling=RELEASED | dict(beta_fast=None, beta_slow=None, truncate=True)),
}  # fmt: skip


def config_with(**rope) -> dict:
    """Return config.json of MODEL with another form of rotary embedding."""
    config = hf_from_model(ModelConfig(**MODEL), "float32", 128)
    return {name: value for name, value in config.items() if not name.startswith("rope_")} | rope


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(form):
    assert model_from_hf(config_with(**FORMS[form])) == ModelConfig(**MODEL)


def test_round_trip():
    for fields in (MODEL, BASE | dict(rope_scaling=YARN), OLMO3 | dict(rope_scaling=YARN | dict(attention_factor=1.5))):
        model = ModelConfig(**fields)
        config = hf_from_model(model, "float32", 128)
        assert model_from_hf(config) == model
    assert hf_from_model(ModelConfig(**MODEL), "float32", 128)["rope_scaling"] == RELEASED


def test_mscale_is_an_attention_factor():
    scaling = RELEASED | dict(attention_factor=None, mscale=2.0, mscale_all_dim=0.5)
    found = model_from_hf(config_with(rope_theta=5e5, rope_scaling=scaling)).rope_scaling
    assert found.attention_factor == pytest.approx((1 + 0.2 * 2.0794415416798357) / (1 + 0.05 * 2.0794415416798357))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "longrope", "llama3", "su", "proportional"])
@pytest.mark.parametrize("form", ["flat", "nested"])
def test_other_types_are_refused(kind, form):
    other = {"rope_type": kind, "factor": 8.0}
    rope = (
        dict(rope_theta=5e5, rope_scaling=other)
        if form == "flat"
        else dict(rope_parameters={"full_attention": PLAIN | other, "sliding_attention": PLAIN})
    )
    with pytest.raises(ConversionError, match=f"{kind}.*only plain rotary embedding and yarn can"):
        model_from_hf(config_with(**rope))


@pytest.mark.parametrize(
    ("rope", "told"),
    [
        (dict(rope_theta=5e5, rope_scaling={"rope_type": "yarn"}), "factor of yarn must be a positive number"),
        (dict(rope_theta=5e5, rope_scaling=RELEASED | dict(factor=True)), "factor of yarn"),
        (dict(rope_theta=5e5, rope_scaling=RELEASED | dict(factor=0.5)), "rope_scaling.factor"),
        (dict(rope_theta=5e5, rope_scaling=RELEASED | dict(factor=10**400)), "rope_scaling.factor"),
        (dict(rope_theta=5e5, rope_scaling=RELEASED | dict(beta_fast=0.5)), "beta_slow"),
        (dict(rope_theta=5e5, rope_scaling=RELEASED | dict(truncate=False)), "truncate = False"),
        (dict(rope_theta=5e5, rope_scaling=RELEASED | dict(mystery=1)), "mystery"),
        (dict(rope_theta=5e5, rope_scaling=RELEASED | dict(partial_rotary_factor=0.5)), "partial_rotary_factor"),
        (dict(rope_theta=None, rope_scaling=RELEASED), "rope_theta is null"),
        (dict(rope_scaling=RELEASED), "rope_theta is missing"),
        (
            dict(rope_theta=1e4, rope_parameters={"full_attention": PLAIN, "sliding_attention": PLAIN}),
            "different theta",
        ),
        (dict(rope_parameters={"full_attention": PLAIN, "sliding_attention": FULL}), "sliding_attention is scaled"),
        (dict(rope_parameters=PLAIN, rope_theta=5e5, rope_scaling=RELEASED), "differ"),
        (dict(rope_theta=5e5, rope_scaling=[8]), "rope_scaling is [8]"),
        (dict(rope_parameters={"full_attention": 3}), "not an object"),
        (dict(rope_parameters={}), "rope_theta is missing"),
    ],
    ids=str,
)
def test_wrong_scaling_is_named(rope, told):
    with pytest.raises(ConversionError) as error:
        model_from_hf(config_with(**rope))
    assert told in str(error.value)


def test_a_theta_that_versions_read_differently_is_said():
    config = config_with(rope_theta=2e4)
    assert "transformers before 5.13" in " ".join(read_config(config).notes)
    assert not read_config(config | dict(rope_theta=5e5)).notes


@pytest.mark.parametrize("theta", [None, 1.0])
def test_there_must_be_a_rotary_embedding_to_scale(theta):
    with pytest.raises((ConfigError, ValueError), match="rope_scaling"):
        ModelConfig(**MODEL | dict(rope_theta=theta))


def test_verify_compares_scaling(tmp_path):
    write_folder(tmp_path / "hf", MODEL)
    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0
    assert not verify(tmp_path / "ours", tmp_path / "hf").problems
    edit_json(
        tmp_path / "hf/config.json",
        rope_parameters={"full_attention": FULL | dict(factor=4.0), "sliding_attention": PLAIN},
    )
    assert "rope_scaling" in " ".join(verify(tmp_path / "ours", tmp_path / "hf").problems)


@pytest.mark.parametrize(
    "parallel",
    [
        dict(tensor_parallel_size=2, pipeline_parallel_size=2),
        pytest.param(dict(context_parallel_size=2, tensor_parallel_size=2), marks=pytest.mark.slow),
    ],
    ids=["TP2xPP2", "CP2xTP2"],
)
def test_layouts_train_alike(parallel, ranks):
    model = MODEL | dict(layer_pattern="WAWA", sliding_window=8, rope_theta=1e4)
    settings = dict(train=dict(steps=3, global_batch_size=4, micro_batch_size=2, dtype="fp32"), steps=3)
    (alone,) = ranks.run(jobs.curve, 1, model=model, parallel={}, **settings)
    (plain,) = ranks.run(jobs.curve, 1, model=model | dict(rope_scaling=None), parallel={}, **settings)
    shared = ranks.run(jobs.curve, 4, model=model, parallel=parallel | dict(recompute_granularity="full"), **settings)
    losses = torch.tensor([run["losses"] for run in (alone, shared[0], plain)])
    norms = torch.tensor([run["norms"] for run in (alone, shared[0], plain)])
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-5, atol=0)
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=0)
    assert (norms[0] - norms[2]).abs().max() > 5 * (norms[0] - norms[1]).abs().max(), "scaling changed nothing"


def olmo_core(**scaling) -> dict:
    """OLMo-core's configuration of MODEL: full attention layers, which alone are scaled, are overrides."""
    config = olmo_core_config(ModelConfig(**OLMO3))
    block = config["model"]["block"]
    full = copy.deepcopy(block)
    del full["sequence_mixer"]["sliding_window"]
    full["sequence_mixer"]["rope"]["scaling"] = {"_CLASS_": "olmo_core.nn.rope.YaRNRoPEScalingConfig"} | scaling
    config["model"]["block_overrides"] = {"3": full}
    return config


def test_olmo_core_has_it_too():
    assert model_from_olmo_core(olmo_core(old_context_len=16)).rope_scaling == ModelConfig(**MODEL).rope_scaling
    found = model_from_olmo_core(olmo_core(factor=4, beta_fast=16, beta_slow=2)).rope_scaling
    assert found.model_dump(exclude_none=True) == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    }


@pytest.mark.parametrize(
    ("scaling", "told"),
    [
        (dict(_CLASS_="olmo_core.nn.rope.PIRoPEScalingConfig"), "PIRoPEScalingConfig"),
        (dict(mystery=1), "mystery"),
        (dict(factor="8"), "factor is '8'"),
    ],
    ids=str,
)
def test_other_scaling_of_olmo_core_is_refused(scaling, told):
    with pytest.raises(ConversionError, match=told):
        model_from_olmo_core(olmo_core(**scaling))


def test_scaled_sliding_layers_of_olmo_core_are_refused():
    config = olmo_core()
    config["model"]["block"] = config["model"]["block_overrides"].pop("3")
    config["model"]["block"]["sequence_mixer"]["sliding_window"] = dict(pattern=[16, 16, 16, -1])
    with pytest.raises(ConversionError, match="none for sliding"):
        model_from_olmo_core(config)
