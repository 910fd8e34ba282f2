"""`model: {from: PATH}`, and the one resolution of a path to a model."""

import json
import sys

import pytest
import torch
from transformers import AutoConfig

from megatron_hybrid.base.errors import ConfigError, UserError
from megatron_hybrid.config.load import load_run
from megatron_hybrid.config.presets import olmo_hybrid_tiny
from megatron_hybrid.convert.architecture import architecture_of
from megatron_hybrid.convert.checkpoint_source import CheckpointSource
from megatron_hybrid.convert.hf.config import hf_from_model, model_from_hf
from megatron_hybrid.convert.hf.original_files import kept_files
from megatron_hybrid.convert.model_folder import open_model
from megatron_hybrid.convert.verify import verify
from testing.task_parity import make_models

REST = [
    "run_dir=run",
    "data.train=[{path: a}]",
    "data.sequence_length=16",
    "train.steps=1",
    "train.global_batch_size=1",
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_from_model(olmo_hybrid_tiny(), "bfloat16", 1024)))
    return tmp_path


def test_a_run_takes_an_architecture_and_changes_it(folder):
    run = load_run(None, [f"model.from={folder}", "model.hidden_size=256", *REST], architecture_of)
    assert run.model == olmo_hybrid_tiny().model_copy(update={"hidden_size": 256, "head_dim": run.model.head_dim})
    (folder / "run.yaml").write_text(f"model: {{from: {folder}, gdn: {{norm_eps: 0.001}}}}\n")
    run = load_run(str(folder / "run.yaml"), REST, architecture_of)
    assert run.model.gdn.norm_eps == 0.001 and run.model.gdn.key_head_dim == 24


@pytest.mark.parametrize(
    ("overrides", "reader", "message"),
    [
        (["model.from=/none"], architecture_of, "model.from: /none: no model is there"),
        (["model.from=3"], architecture_of, "model.from: 3 is not the path"),
        (["model.from=a", "model.base_preset=olmo3_7b"], architecture_of, "model.from: excludes base_preset"),
        (["model.from=a"], None, "model.from: is not read by this command"),
    ],
)
def test_wrong_sources_are_refused(overrides, reader, message):
    with pytest.raises(ConfigError) as caught:
        load_run(None, [*overrides, *REST], reader)
    assert message in str(caught.value)


@pytest.mark.parametrize("parameters", [None, {"rope_type": None}, {"rope_theta": None}])
def test_every_spelling_of_no_rotary_embedding_is_read(parameters):
    config = hf_from_model(olmo_hybrid_tiny(), "bfloat16", 1024)
    assert model_from_hf(config | {"rope_parameters": parameters}).rope_theta is None


def test_old_layer_types_are_read_and_new_ones_written(tmp_path):
    config = hf_from_model(olmo_hybrid_tiny(), "bfloat16", 1024)
    names = {"linear_attention": "mamba", "full_attention": "attention"}
    old = config | {"layer_types": [names[name] for name in config["layer_types"]]}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert AutoConfig.from_pretrained(tmp_path).layer_types == config["layer_types"], "transformers' own reading"
    assert model_from_hf(old) == model_from_hf(config)
    assert hf_from_model(model_from_hf(old), "bfloat16", 1024) == config
    with pytest.raises(UserError, match="layer_types is not a list"):
        model_from_hf(config | {"layer_types": ["mamba2"] * 8})


def test_a_checkpoint_and_its_export_hold_the_same(tmp_path):
    checkpoint, export = make_models(tmp_path)
    with open_model(checkpoint) as ours, open_model(export) as theirs:
        assert ours.model == theirs.model
        for name in ("embedding.weight", "layers.0.gdn.v_conv.weight", "layers.2.attention.q_proj.weight"):
            assert torch.equal(ours.read(name), theirs.read(name))
        assert theirs.tokenizer == str(export) and ours.tokenizer is not None
    assert architecture_of(str(checkpoint)) == architecture_of(str(export))
    assert "vllm serve PATH --enforce-eager --disable-cascade-attn" in (export / "README.md").read_text()
    with pytest.raises(UserError, match="no model is there"):
        open_model(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    checkpoint.rename(tmp_path / "run" / "checkpoints" / "step-00000001")
    assert architecture_of(str(tmp_path / "run")) == architecture_of(str(export))
    source = CheckpointSource(tmp_path / "run")
    assert source.folder.name == "step-00000001" and kept_files(source.folder)
    assert verify(tmp_path / "run").problems == []


def test_reading_an_architecture_needs_no_torch(folder, root):
    import subprocess

    code = f"import sys; from megatron_hybrid.convert.architecture import architecture_of; architecture_of({str(folder)!r});"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
