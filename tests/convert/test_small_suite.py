"""AI2's small hybrid suite from Hugging Face's form and back, bit for bit. transformers lacks its class."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.config.presets import SMALL
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf.config import hf_from_model, model_from_hf
from megatron_hybrid.convert.hf.registry import architecture_for
from testing.models import small
from testing.peers import transformers_model
from tests.convert.jobs import load_and_save, logits
from tests.convert.test_huggingface import equal, to_ours, to_theirs

MODEL = small("GGGGA", 48, 6, 3, 8, eos_token_id=5, pad_token_id=6)
CONFIG = dict(
    model_type="mainline_ladder", architectures=["MainlineLadderForCausalLM"], vocab_size=131, hidden_size=48, intermediate_size=96,
    num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=3, head_dim=8, hidden_act="silu", rms_norm_eps=1e-6,
    embed_scale=48**0.5, embedding_norm_eps=1e-6, use_attention_gate=True, use_head_qk_norm=True, linear_num_key_heads=6,
    linear_num_value_heads=6, linear_key_head_dim=8, linear_value_head_dim=16, linear_allow_neg_eigval=True, rope_parameters=None,
    layer_types=["linear_attention"] * 4 + ["full_attention"], eos_token_id=5, pad_token_id=6, bos_token_id=None, auto_map={},
)  # fmt: skip


def write(folder, joined: bool = True):
    """Write a model whose convolutions are joined or in parts, and return it."""
    folder.mkdir()
    peer = transformers_model(ModelConfig(**MODEL))
    tensors = {name: parameter.detach().clone() for name, parameter in peer.named_parameters()}
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors if joined else in_parts(tensors), folder / "model.safetensors")
    return peer, tensors


def in_parts(tensors: dict) -> dict:
    found = {}
    for name, tensor in tensors.items():
        parts = zip("qkv", tensor.split((48, 48, 96)), strict=True) if name.endswith("conv1d.weight") else ()
        found |= {name.replace("conv1d", f"{letter}_conv1d"): part.clone() for letter, part in parts} or {name: tensor}
    return found


@pytest.mark.parametrize("joined", [True, False])
def test_a_model_round_trips_through_training(joined, tmp_path, ranks):
    peer, tensors = write(tmp_path / "hf", joined)
    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0
    arguments = dict(checkpoint=str(tmp_path / "ours"), folder=str(tmp_path / "run"), train={})
    saved = ranks.run(load_and_save, 2, parallel=dict(tensor_parallel_size=2), **arguments)[0]["path"]
    assert to_theirs(saved, tmp_path / "export") == 0
    assert equal(load_file(tmp_path / "export/model.safetensors"), in_parts(tensors))
    exported = json.loads((tmp_path / "export/config.json").read_text())
    assert {n for n in CONFIG if CONFIG[n] != exported.get(n)} == {"auto_map"}
    tokens = torch.arange(40)[None] % 131
    (ours,) = ranks.run(logits, 1, checkpoint=str(tmp_path / "ours"), tokens=tokens)
    with torch.no_grad():
        theirs = peer(tokens).logits
    assert (ours["logits"][..., :131] - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_presets_are_what_an_export_says(name):
    model = SMALL[name]()
    config = hf_from_model(model, "bfloat16", 8192)
    assert model_from_hf(config).model_dump() | {"layer_pattern": model.layers} == model.model_dump() | {
        "layer_pattern": model.layers
    }
    assert config["head_dim"] == 128 and config["num_key_value_heads"] == 8 and config["rope_parameters"] is None


def test_absent_fields_take_the_class_s_defaults():
    kept = ("model_type", "architectures")
    model = model_from_hf({name: CONFIG[name] for name in kept})
    assert model.layers == tuple("GGGGA" * 2)
    assert model.model_dump() | {"layer_pattern": ""} == SMALL["olmo_hybrid_small_275m"]().model_dump() | {
        "layer_pattern": ""
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(use_attention_gate=False), "use_attention_gate = False cannot be represented"),
        (dict(use_head_qk_norm=False), "use_head_qk_norm = False cannot be represented"),
        (dict(embedding_norm_eps=1e-5), "embedding_norm_eps = 1e-05 cannot be represented"),
        (dict(embed_scale=-1.0), "embed_scale"),
        (dict(use_ssmax=True), "unknown field 'use_ssmax'"),
    ],
)
def test_what_cannot_be_represented_is_refused(changes, message):
    with pytest.raises(ConversionError, match=message):
        model_from_hf(CONFIG | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rope_theta=5e5), "mainline_ladder: model.rope_theta is 500000"),
        (dict(embedding_norm=False), "mainline_ladder: model.embedding_norm is false"),
        (dict(blocks={}), "mainline_ladder: model.blocks.G is not the block of this class"),
        (dict(blocks={}), "olmo_hybrid: model.embedding_norm is true, and this class has plain embeddings"),
        (dict(blocks={}, embedding_norm=False), "olmo_hybrid: model.embed_scale is 6.9282, and this class has plain"),
    ],
)
def test_a_model_that_no_class_computes_is_not_exported(changes, message):
    with pytest.raises(ConversionError, match=message):
        architecture_for(ModelConfig(**MODEL | changes))
