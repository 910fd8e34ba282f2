"""Presets, their parameters and FLOPs, against transformers' own models and the published figures."""

import pytest

from megatron_hybrid.arch.flops import (
    count_parameters,
    layer_training_flops,
    parameters_by_part,
    training_flops_by_part,
    training_flops_per_token,
)
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.config import presets
from megatron_hybrid.config.qwen_presets import QWEN
from megatron_hybrid.mixers.gated_delta_net.config import GatedDeltaNetConfig
from testing.peers import transformers_count

SMALL = ModelConfig(
    layer_pattern="GGA,WG",
    hidden_size=48,
    ffn_hidden_size=80,
    vocab_size=101,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    gdn=GatedDeltaNetConfig(num_key_heads=2, num_value_heads=6, key_head_dim=5, value_head_dim=7),
    sliding_window=16,
)


def test_olmo_hybrid_7b_is_exact() -> None:
    model = presets.olmo_hybrid_7b()
    assert count_parameters(model) == 7_430_870_688
    assert model.layers == tuple("GGGA" * 8)
    assert parameters_by_part(model) == {
        "embedding": 100352 * 3840,
        "G": 24 * (88_750_332 + 126_812_160 + 2 * 3840),
        "A": 8 * (58_990_080 + 126_812_160 + 2 * 3840),
        "final_norm": 3840,
        "output": 100352 * 3840,
    }


def test_olmo_hybrid_7b_flops() -> None:
    assert training_flops_per_token(presets.olmo_hybrid_7b(), 8192) / 1e9 == pytest.approx(44.1, abs=0.05)


def test_tiny_fits_its_layout() -> None:
    model = presets.olmo_hybrid_tiny()
    assert 1_000_000 < count_parameters(model) < 2_000_000
    assert model.layers == tuple("GGGAGGGA") and model.vocab_size == 257 and model.eos_token_id == 256


def test_olmo3_7b() -> None:
    model = presets.olmo3_7b()
    assert model.layers == tuple("WWWA" * 8)
    assert count_parameters(model) == pytest.approx(7.3e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("olmo_hybrid_small_275m", 275_493_760),
        ("olmo_hybrid_small_810m", 810_354_816),
        ("olmo_hybrid_small_1.4b", 1_422_110_720),
    ],
)
def test_small_suite_has_the_parameters_that_olmo_core_states(name: str, parameters: int) -> None:
    model = presets.SMALL[name]()
    assert count_parameters(model) == sum(tensor.numel for tensor in model_tensors(model).values()) == parameters
    assert parameters_by_part(model)["embedding_norm"] == model.hidden_size
    assert list(model_tensors(model))[:2] == ["embedding.weight", "embedding_norm.weight"]
    assert model.embed_scale**2 == pytest.approx(model.hidden_size) and model.kv_heads == 8


@pytest.mark.slow  # transformers takes seconds to import
@pytest.mark.parametrize(
    "model",
    [
        presets.olmo_hybrid_7b(),
        presets.olmo3_7b(),
        SMALL.model_copy(update={"layer_pattern": "GGA", "head_dim": None, "num_key_value_heads": 3}),
        SMALL.model_copy(update={"layer_pattern": "GAGA", "head_dim": 8, "tie_embeddings": True}),
        *(preset() for preset in QWEN.values()),
    ],
    ids=["olmo_hybrid_7b", "olmo3_7b", "grouped", "tied", *QWEN],
)
def test_parameters_are_transformers(model: ModelConfig) -> None:
    assert count_parameters(model) == transformers_count(model)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_the_tensors(tied: bool) -> None:
    model = SMALL.model_copy(update={"tie_embeddings": tied})
    assert count_parameters(model) == sum(tensor.numel for tensor in model_tensors(model).values())
    assert list(parameters_by_part(model)) == ["embedding", "G", "A", "W", "final_norm", "output"]


@pytest.mark.parametrize("of", presets.SIZED)
def test_pure_models_have_the_size_of_another(of: str) -> None:
    base, gdn, attention = presets.preset(of), presets.pure_gdn(of), presets.pure_attention(of)
    assert gdn.layers == ("G",) * base.num_layers and attention.layers == ("A",) * base.num_layers
    same = {"hidden_size", "ffn_hidden_size", "vocab_size", "num_attention_heads", "eos_token_id", "rope_theta"}
    for pure in (gdn, attention):
        assert pure.model_dump(include=same) == base.model_dump(include=same)
        assert pure.sliding_window is None
    assert gdn.gdn is not None and attention.gdn is None
    if base.gdn is not None:
        assert gdn.gdn == base.gdn
    assert training_flops_per_token(gdn, 2048) == pytest.approx(training_flops_per_token(base, 2048), rel=0.5)


def test_gdn_of_a_transformer_takes_olmo_hybrids_proportions() -> None:
    gdn = presets.pure_gdn("olmo3_7b").gdn
    assert gdn is not None
    assert (gdn.num_key_heads, gdn.num_value_heads, gdn.key_head_dim, gdn.value_head_dim) == (32, 32, 96, 192)


# FLOPs


def test_flops_of_a_layer_by_hand() -> None:
    h, f, q, kv = 48, 80, 60, 20
    attention = 2 * (h * (2 * q + 2 * kv) + 3 * h * f)
    assert layer_training_flops(SMALL, "A", 64) == 3 * (attention + 4 * q * 32)  # 32 tokens seen on average
    # window - window^2 / (2 sequence) = 14 seen
    assert layer_training_flops(SMALL, "W", 64) == 3 * (attention + 4 * q * 14)
    gdn = 2 * (h * (2 * 10 + 3 * 42 + 2 * 6) + 3 * h * f) + 8 * 6 * 5 * 7
    assert layer_training_flops(SMALL, "G", 64) == 3 * gdn
    assert training_flops_by_part(SMALL, 64)["output"] == 6 * 48 * 101
    assert training_flops_per_token(SMALL, 64) == sum(training_flops_by_part(SMALL, 64).values())


def test_a_window_as_long_as_the_sequence_is_attention() -> None:
    for sequence in (8, 16):
        assert layer_training_flops(SMALL, "W", sequence) == layer_training_flops(SMALL, "A", sequence)
    assert layer_training_flops(SMALL, "W", 17) < layer_training_flops(SMALL, "A", 17)


@pytest.mark.parametrize(("sequence", "window"), [(64, 16), (100, 7), (32, 32)])
def test_tokens_seen_are_those_of_a_mask(sequence: int, window: int) -> None:
    """The formula leaves out half a token, as is usual: the mask's average is that much higher."""
    model = SMALL.model_copy(update={"sliding_window": window})
    per_token = layer_training_flops(model, "W", sequence) - layer_training_flops(
        SMALL.model_copy(update={"sliding_window": 1}), "W", 10**9
    )
    seen = sum(min(position + 1, window) for position in range(sequence)) / sequence
    assert per_token / (3 * 4 * 60) + 1 == pytest.approx(seen, abs=0.51)


def test_gdn_does_not_depend_on_the_sequence() -> None:
    assert layer_training_flops(SMALL, "G", 64) == layer_training_flops(SMALL, "G", 65536)
