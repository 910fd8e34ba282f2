"""Fields of config.json: harmless ones are accepted, absent ones take transformers' defaults, all others are refused."""

import json

import pytest

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf.config import hf_from_model, model_from_hf
from megatron_hybrid.convert.hf.registry import ARCHITECTURES
from tests.convert.folders import BASE, OLMO3, edit_json, write_folder
from tests.convert.test_huggingface import to_ours, to_theirs

CONFIGS = {
    name: hf_from_model(ModelConfig(**fields), "float32", 128)
    for name, fields in (("olmo_hybrid", BASE), ("olmo3", OLMO3))
}
HARMLESS = [
    dict(unsloth_version="2026.1"),
    dict(unsloth_fixed=True),
    dict(axolotl_config_path="x"),
    dict(tokenizer_class="GPT2Tokenizer"),
    dict(auto_map={"AutoConfig": "configuration_x.X"}),
    dict(quantization_config=None),
    dict(pruned_heads={}),
    dict(torchscript=False, is_decoder=False, use_bfloat16=False, gradient_checkpointing=False),
    dict(max_length=20, temperature=0.6, do_sample=True, min_p=0.1),
    dict(task_specific_params=None, finetuning_task=None, prefix=None),
    dict(sep_token_id=None, cls_token_id=1, decoder_start_token_id=None),
    dict(id2label={"0": "A"}, label2id={"A": 0}, problem_type=None),
    dict(torch_dtype="bfloat16", _attn_implementation_autoset=True, _commit_hash="0", _name_or_path="x"),
    dict(model_max_length=4096, per_layer_config={}, is_causal=True, loss_type="ForCausalLM"),
]
HARMFUL = [
    dict(quantization_config={"quant_method": "fp8"}),
    dict(pruned_heads={"0": [1]}),
    dict(per_layer_config={"0": {"num_attention_heads": 1}}),
    dict(is_causal=False),
    dict(is_encoder_decoder=True),
    dict(add_cross_attention=True),
    dict(attention_bias=True),
    dict(hidden_act="gelu"),
    dict(partial_rotary_factor=0.5),
    dict(final_logit_softcapping=30.0),
    dict(transformers_weights="other.safetensors"),
    dict(text_config={"hidden_size": 3}),
    dict(mystery=None),
]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("change", HARMLESS, ids=str)
def test_fields_that_change_no_logit_are_taken(kind, change):
    assert model_from_hf(CONFIGS[kind] | change) == model_from_hf(CONFIGS[kind])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("change", HARMFUL, ids=str)
def test_fields_that_change_the_model_are_refused(kind, change):
    with pytest.raises(ConversionError, match=next(iter(change))):
        model_from_hf(CONFIGS[kind] | change)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_that_transformers_writes_is_known(kind):
    import transformers

    written = getattr(transformers, ARCHITECTURES[kind].class_name.replace("ForCausalLM", "Config"))().to_dict()
    assert not written.keys() - set().union(*ARCHITECTURES[kind].fields.tables())


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_field_is_in_one_table(kind):
    tables = ARCHITECTURES[kind].fields.tables()
    assert len(set().union(*tables)) == sum(map(len, tables))


@pytest.mark.parametrize("kind", CONFIGS)
def test_defaults_are_those_of_transformers(kind):
    import transformers

    theirs = getattr(transformers, ARCHITECTURES[kind].class_name.replace("ForCausalLM", "Config"))()
    defaults = ARCHITECTURES[kind].fields.defaults
    assert {name: getattr(theirs, name) for name in defaults} == defaults
    config = {name: value for name, value in CONFIGS[kind].items() if name not in defaults and name != "layer_types"}
    model = model_from_hf(config | dict(num_attention_heads=32, hidden_size=4096, num_key_value_heads=32))
    kinds = {"G": "linear_attention", "A": "full_attention", "W": "sliding_attention"}
    assert [kinds[layer] for layer in model.layers] == theirs.layer_types
    assert (model.norm_eps, model.vocab_size, model.eos_token_id) == (
        theirs.rms_norm_eps,
        theirs.vocab_size,
        theirs.eos_token_id,
    )


def test_a_small_hybrid_without_layer_types_ends_in_attention():
    config = {name: value for name, value in CONFIGS["olmo_hybrid"].items() if name != "layer_types"}
    assert "".join(model_from_hf(config | dict(num_hidden_layers=3)).layers) == "GGA"


def test_default_tokens_outside_the_vocabulary_are_none():
    config = {n: v for n, v in CONFIGS["olmo_hybrid"].items() if n not in ("eos_token_id", "pad_token_id")}
    model = model_from_hf(config)
    assert (model.eos_token_id, model.pad_token_id) == (None, None)


def test_fields_come_back(tmp_path, capsys):
    write_folder(tmp_path / "hf", BASE)
    kept = dict(tokenizer_class="GPT2Tokenizer", sep_token_id=4, use_cache=False, temperature=0.6, bos_token_id=3)
    edit_json(tmp_path / "hf/config.json", eos_token_id=[5, 7], auto_map={"AutoConfig": "x.X"}, **kept)
    assert to_ours(tmp_path / "hf", tmp_path / "ours", "--eos-token-id", "7") == 0
    assert "auto_map" in capsys.readouterr().err
    assert to_theirs(tmp_path / "ours", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {name: config[name] for name in kept} == kept
    assert config["eos_token_id"] == [5, 7] and "auto_map" not in config
