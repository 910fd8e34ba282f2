"""An architecture is one subclass and one registry entry: a toy one converts in both directions with no other change."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.convert.hf import registry
from megatron_hybrid.convert.hf.base import Architecture
from megatron_hybrid.convert.hf.fields import FieldTable
from megatron_hybrid.convert.hf.names import LayerNames, each
from megatron_hybrid.convert.hf.rope import RopeForms
from tests.convert.folders import OLMO3
from tests.convert.test_huggingface import equal, to_ours, to_theirs

LAYER = LayerNames(
    {
        **each("qkvo", "attention.{}_proj.weight", "mixer.{}.weight"),
        **each("qk", "attention.{}_norm.weight", "mixer.norm_{}.weight"),
        **each(("gate", "up", "down"), "mlp.{}_proj.weight", "ffn.{}.weight"),
        **each(("mixer", "mlp"), "{}_norm.weight", "{}_norm.weight"),
    },
    spellings={"ffn.w2.weight": "ffn.down.weight"},
)


class Toy(Architecture):
    """Full attention in all layers, with names and a field of its own."""

    model_type = "toy"
    class_name = "ToyForCausalLM"
    layer_types = {"all": "A"}
    fields = FieldTable(required={"toy_gate": (False,)}, ignored={"toy_comment": "it is a comment"})
    rope = RopeForms(optional=False, per_layer_type=False)
    layers = {"A": LAYER}

    def unsupported_reason(self, model):
        return None if set(model.layers) == {"A"} else "it has only full attention"

    def default_layer_types(self, count):
        return ["all"] * count

    def read(self, fields, layer_types):
        return {}

    def write(self, model, positions):
        return {"toy_gate": False}


def test_a_toy_architecture_converts_both_ways(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "ARCHITECTURES", {"toy": Toy(), **registry.ARCHITECTURES})
    model = ModelConfig(**OLMO3 | dict(layer_pattern="AA", sliding_window=None))
    config = dict(
        model_type="toy", vocab_size=67, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        rms_norm_eps=1e-6, rope_parameters=dict(rope_type="default", rope_theta=5e5), eos_token_id=5, pad_token_id=6,
        toy_comment="x",
    )  # fmt: skip
    names = Toy().names(model)
    tensors = {names.theirs(n): torch.randn(spec.shape) for n, spec in model_tensors(model).items()}
    assert "model.layers.1.ffn.down.weight" in tensors and "model.layers.0.mixer.norm_q.weight" in tensors
    other = {n.replace("ffn.down", "ffn.w2"): t for n, t in tensors.items()}
    (tmp_path / "hf").mkdir()
    save_file(other, tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/config.json").write_text(json.dumps(config))

    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0
    assert to_theirs(tmp_path / "ours", tmp_path / "export") == 0

    assert equal(load_file(tmp_path / "export/model.safetensors"), tensors)
    exported = json.loads((tmp_path / "export/config.json").read_text())
    assert exported["architectures"] == ["ToyForCausalLM"] and exported["toy_gate"] is False
    assert exported["layer_types"] == ["all", "all"] and "toy_comment" not in exported
    assert to_ours(tmp_path / "export", tmp_path / "again") == 0
    capsys.readouterr()

    (tmp_path / "hf/config.json").write_text(json.dumps(config | dict(toy_gate=True)))
    assert to_ours(tmp_path / "hf", tmp_path / "gated") != 0
    assert "toy_gate = True cannot be represented" in capsys.readouterr().err


def test_shared_code_names_no_architecture():
    folder = Path(registry.__file__).parent
    own = {path.name for path in (*folder.glob("olmo*.py"), *folder.glob("qwen*.py"))} | {"registry.py"}
    shared = [path for path in folder.glob("*.py") if path.name not in own]
    assert len(own) == 5 and len(shared) > 8
    named = re.compile(r"olmo3|olmo_hybrid|qwen|gdn|gated_delta_net|linear_|[\"'][GAW][\"']")
    assert {path.name: named.findall(path.read_text()) for path in shared if named.search(path.read_text())} == {}
