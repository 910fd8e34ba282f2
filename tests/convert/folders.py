"""Hugging Face folders in every known spelling, with random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_hybrid.arch.model import ModelConfig
from testing.models import hybrid
from testing.peers import transformers_model

BASE = hybrid("GGGA", 24, 3, 4, value_head_dim=10, ffn_hidden_size=40, vocab_size=67, eos_token_id=5, pad_token_id=6)
GDN = BASE["gdn"]
MODELS = {
    "odd heads": BASE,
    "tied": BASE | dict(tie_embeddings=True),
    "no rotary": BASE | dict(rope_theta=None),
    "grouped values": BASE | dict(gdn=dict(num_key_heads=2, num_value_heads=6, key_head_dim=4, value_head_dim=6)),
    "grouped queries": BASE | dict(num_attention_heads=4, num_key_value_heads=2),
    "attention first": BASE | dict(layer_pattern="AGAG", gdn=GDN | dict(allow_negative_eigenvalues=False)),
}
OLMO3 = BASE | dict(layer_pattern="WWWA", gdn=None, sliding_window=16, num_attention_heads=4)
YARN = dict(factor=8.0, original_max_position_embeddings=16)
SPELLINGS = ("transformers", "joined", "separate", "released", "exporter")


def spelled(model: ModelConfig, tensors: dict[str, torch.Tensor], spelling: str) -> dict[str, torch.Tensor]:
    """Return a state dict with transformers' names in another spelling."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("linear_attn.conv1d.weight") and spelling != "joined":
            widths = (model.gdn.key_dim, model.gdn.key_dim, model.gdn.value_dim)
            for letter, part in zip("qkv", tensor.split(widths), strict=True):
                result[name.replace("conv1d", f"{letter}_conv1d")] = part.clone()
            continue
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        if spelling == "released" and layer and model.layers[int(layer)] == "G":
            name = name.replace("input_layernorm", "attention_layer_norm")
            name = name.replace("post_attention_layernorm", "feedforward_layer_norm")
        if spelling == "exporter":
            name = name.replace("linear_attn.o_proj", "linear_attn.out_proj").replace(
                "linear_attn.o_norm", "linear_attn.norm"
            )
        result[name] = tensor
    return result


def write_folder(
    folder: Path, fields: dict, spelling: str = "transformers", dtype: torch.dtype = torch.float32, shard: str = "5GB"
):
    """Write a folder with random weights, and return the transformers model that has them."""
    model = ModelConfig(**fields)
    peer = transformers_model(model).to(dtype)
    peer.config.eos_token_id, peer.config.pad_token_id = model.eos_token_id, model.pad_token_id
    peer.save_pretrained(folder, max_shard_size=shard)
    if spelling != "transformers":
        tensors = {n: p.detach().clone() for n, p in peer.named_parameters()}
        for path in folder.glob("model*"):
            path.unlink()
        save_file(spelled(model, tensors, spelling), folder / "model.safetensors")
    return peer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a folder's safetensors files."""
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def edit_json(path: Path, **changes) -> None:
    """Set fields of a JSON file; `...` removes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))
