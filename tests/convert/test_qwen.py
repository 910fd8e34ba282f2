"""Qwen3.5 from Hugging Face and back, bit for bit: text alone, and next to a vision tower whose tensors are kept."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.config.qwen_presets import QWEN
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf.config import hf_from_model, model_from_hf
from megatron_hybrid.convert.hf.registry import architecture_for
from testing.models import hybrid, qwen
from testing.peers import transformers_model
from tests.convert.folders import edit_json
from tests.convert.jobs import load_and_save
from tests.convert.test_huggingface import equal, to_ours, to_theirs

MODEL = qwen("GGGA", 48, 6, 3, 16, 3, eos_token_id=5)
VISION = dict(
    depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=48, num_position_embeddings=16, patch_size=4
)  # fmt: skip
MROPE = dict(mrope_section=[1, 1, 0], mrope_interleaved=True)


def text_config(**changes) -> dict:
    """Fields of config.json, as released models have them."""
    config = hf_from_model(ModelConfig(**MODEL), "float32", 64)
    config["rope_parameters"] |= MROPE
    config |= dict(attn_output_gate=True, full_attention_interval=4, mtp_num_hidden_layers=1, mamba_ssm_dtype="float32")
    return config | changes


PUBLISHED = {
    "qwen3_5_0.8b": dict(
        hidden_size=1024, intermediate_size=3584, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=2,
        linear_num_value_heads=16, tie_word_embeddings=True,
    ),
    "qwen3_5_27b": dict(
        hidden_size=5120, intermediate_size=17408, num_hidden_layers=64, num_attention_heads=24, num_key_value_heads=4,
        linear_num_value_heads=48, tie_word_embeddings=False,
    ),
}  # fmt: skip
"""Sizes in the text_config of published models."""
COMMON = dict(
    model_type="qwen3_5_text", attention_bias=False, attention_dropout=0.0, attn_output_gate=True, bos_token_id=None,
    eos_token_id=248044, full_attention_interval=4, head_dim=256, hidden_act="silu", initializer_range=0.02,
    linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_num_key_heads=16, linear_value_head_dim=128, mamba_ssm_dtype="float32",
    max_position_embeddings=262144, mlp_only_layers=[], mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False,
    pad_token_id=None, partial_rotary_factor=0.25, rms_norm_eps=1e-6, use_cache=True, vocab_size=248320,
    rope_parameters=dict(
        mrope_interleaved=True, mrope_section=[11, 11, 10], partial_rotary_factor=0.25, rope_theta=10000000, rope_type="default"
    ),
)  # fmt: skip
"""Fields that all of them share."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_models(name):
    text = COMMON | PUBLISHED[name]
    whole = dict(
        model_type="qwen3_5", architectures=["Qwen3_5ForConditionalGeneration"], text_config=text, vision_config=VISION,
        tie_word_embeddings=text["tie_word_embeddings"], image_token_id=248056, video_token_id=248057, vision_start_token_id=248053,
        vision_end_token_id=248054, transformers_version="4.57.0",
    )  # fmt: skip
    preset = QWEN[name]()
    for config in (text, whole):
        found = model_from_hf(config)
        assert found.model_dump() | {"layer_pattern": found.layers} == preset.model_dump() | {
            "layer_pattern": preset.layers
        }


def write_multimodal(folder):
    """Write a model with a vision tower and a layer of multi-token prediction, and return transformers' model."""
    import transformers

    text = {
        name: value for name, value in text_config().items() if name not in ("architectures", "model_type", "dtype")
    }
    config = transformers.Qwen3_5Config(text_config=text, vision_config=VISION, tie_word_embeddings=True)
    config._attn_implementation = "eager"
    peer = transformers.Qwen3_5ForConditionalGeneration(config).float().eval()
    weights = dict(transformers_model(ModelConfig(**MODEL)).state_dict())
    peer.model.language_model.load_state_dict(
        {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}
    )
    peer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    extra = {"mtp.norm.weight": torch.randn(48, dtype=torch.bfloat16), "mtp.scale": torch.tensor(2.0)}
    save_file(tensors | extra, folder / "model.safetensors")
    return peer


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_text_alone_round_trips(tmp_path):
    transformers_model(ModelConfig(**MODEL)).save_pretrained(tmp_path / "hf")
    edit_json(tmp_path / "hf/config.json", **text_config())
    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0
    assert to_theirs(tmp_path / "ours", tmp_path / "export") == 0
    assert equal(load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "export/model.safetensors"))
    theirs, mine = config_of(tmp_path / "hf"), config_of(tmp_path / "export")
    assert {n for n in theirs if theirs[n] != mine.get(n)} <= {"transformers_version", "full_attention_interval"}
    assert model_from_hf(mine) == model_from_hf(theirs)


def test_types_of_published_files_come_back(tmp_path, ranks):
    """Published checkpoints are BF16, with A_log and the norm of the delta rule in F32, and dt_bias in BF16."""
    folder = tmp_path / "hf"
    transformers_model(ModelConfig(**MODEL)).save_pretrained(folder)
    edit_json(folder / "config.json", **text_config())
    fp32 = ("linear_attn.A_log", "linear_attn.norm.weight")
    stored = {
        name: tensor if name.endswith(fp32) else tensor.bfloat16()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(stored, folder / "model.safetensors")
    assert to_ours(folder, tmp_path / "ours") == 0
    assert to_theirs(tmp_path / "ours", tmp_path / "export") == 0
    exported = load_file(tmp_path / "export/model.safetensors")
    assert equal(stored, exported)
    assert {name: tensor.dtype for name, tensor in exported.items()} == {n: t.dtype for n, t in stored.items()}

    arguments = dict(checkpoint=str(tmp_path / "ours"), folder=str(tmp_path / "run"), train={"dtype": "bf16"})
    saved = ranks.run(load_and_save, 1, parallel={}, **arguments)[0]["path"]  # as training does
    assert to_theirs(saved, tmp_path / "trained") == 0
    trained = load_file(tmp_path / "trained/model.safetensors")
    assert {name for name, tensor in trained.items() if tensor.dtype == torch.float32} == {
        name for name in trained if name.endswith(("A_log", "dt_bias"))
    }


def test_a_vision_tower_is_kept_through_training(tmp_path, ranks, caplog):
    import transformers

    peer = write_multimodal(tmp_path / "hf")
    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0
    arguments = dict(checkpoint=str(tmp_path / "ours"), folder=str(tmp_path / "run"), train={})
    parallel = dict(tensor_parallel_size=2)  # heads are read from slices of two ranks
    saved = ranks.run(load_and_save, 2, parallel=parallel, **arguments)[0]["path"]
    assert to_theirs(saved, tmp_path / "export") == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "export"))
    assert equal(before, after) and sum("visual" in name or name.startswith("mtp.") for name in after) > 15
    theirs, mine = config_of(tmp_path / "hf"), config_of(tmp_path / "export")
    assert {n for n in theirs if theirs[n] != mine.get(n)} <= {"transformers_version", "text_config"}
    assert mine["text_config"]["rope_parameters"] == theirs["text_config"]["rope_parameters"]
    assert mine["text_config"]["mtp_num_hidden_layers"] == 1

    again = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(
        tmp_path / "export", attn_implementation="eager"
    )
    tokens = torch.arange(40)[None] % 131
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, peer(tokens).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(attn_output_gate=False), "attn_output_gate = False cannot be represented"),
        (dict(partial_rotary_factor=0.5), r"partial_rotary_factor is given as \[0.25, 0.5\]"),
        (dict(mlp_only_layers=[1]), r"mlp_only_layers = \[1\] cannot be represented"),
        (dict(linear_num_value_heads=7), "num_value_heads: 7 is not a multiple"),
        (
            dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e7, factor=4.0, partial_rotary_factor=0.25)),
            "rope_scaling: is only implemented for whole heads",
        ),
    ],
)
def test_what_cannot_be_represented_is_refused(changes, message):
    with pytest.raises(ConversionError, match=message):
        model_from_hf(text_config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(text_config=None), "text_config is missing"),
        (dict(audio_config={}), "unknown field 'audio_config' around text_config"),
        (dict(tie_word_embeddings=False), "tie_word_embeddings is False, and True in text_config"),
    ],
)
def test_a_contradiction_around_the_text_is_refused(changes, message):
    config = dict(model_type="qwen3_5", text_config=text_config(), tie_word_embeddings=True, vision_config=VISION)
    config["text_config"].pop("architectures")
    assert model_from_hf(config) == model_from_hf(text_config())
    with pytest.raises(ConversionError, match=message):
        model_from_hf(config | changes)


def test_layers_follow_the_interval_and_defaults_are_those_of_transformers():
    config = text_config(num_hidden_layers=6, full_attention_interval=3)
    del config["layer_types"], config["rope_parameters"]["partial_rotary_factor"]
    model = model_from_hf(config)
    assert model.layers == tuple("GGAGGA") and model.rotary_factor == 0.25


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MODEL | dict(zero_centered_norm=False), "qwen3_5_text: model.zero_centered_norm is false"),
        (MODEL | dict(rope_theta=None), "qwen3_5_text: model.rope_theta is null"),
        (MODEL | dict(gdn=MODEL["gdn"] | dict(norm_eps=1e-5)), "qwen3_5_text: model.gdn.norm_eps = 1e-05 differs"),
        (
            MODEL | dict(gdn=MODEL["gdn"] | dict(allow_negative_eigenvalues=True)),
            "qwen3_5_text: model.gdn.allow_negative_eigenvalues is true",
        ),
        (hybrid("GA", 32, 2, 8, zero_centered_norm=True), "olmo_hybrid: model.zero_centered_norm is true"),
        (
            MODEL | dict(blocks={"A": MODEL["blocks"]["A"] | dict(norm="peri")}),
            "model.blocks.A is not the block of this class",
        ),
    ],
)
def test_a_model_that_transformers_cannot_compute_is_not_exported(model, message):
    with pytest.raises(ConversionError, match=message):
        architecture_for(ModelConfig(**model))
