"""Models with Kimi Delta Attention that its tests share, and transformers' model of the same sizes."""

import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.mixers.kda.hugging_face import from_hugging_face

KDA = dict(num_heads=3, key_head_dim=8, value_head_dim=16, gate_rank=10)
"""Tensor parallel ranks pad the heads and, where they are four, the low-rank channels."""
MODEL = dict(
    layer_pattern="KKA", hidden_size=48, ffn_hidden_size=96, vocab_size=131, num_attention_heads=6, num_key_value_heads=3,
    head_dim=8, kda=KDA,
)  # fmt: skip
KIMI = MODEL | dict(layer_pattern="KK", kda=dict(num_heads=3, key_head_dim=8, value_head_dim=8), norm_eps=1e-5)
"""transformers has one head dim, which is also the rank, and one epsilon."""


def kimi_model(seed: int = 0):
    """Return transformers' KimiLinearForCausalLM of KIMI's sizes, all layers of KDA and a dense MLP, every weight random."""
    import transformers

    model, kda = ModelConfig(**KIMI), KIMI["kda"]
    config = transformers.KimiLinearConfig(
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers, rms_norm_eps=model.norm_eps, linear_num_heads=kda["num_heads"],
        linear_head_dim=kda["key_head_dim"], layer_types=["linear_attention"] * model.num_layers,
        mlp_layer_types=["dense"] * model.num_layers, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip
    peer, generator = transformers.KimiLinearForCausalLM(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.4 if "conv1d" in name else 1.0 if "A_log" in name or "dt_bias" in name else 0.05
            parameter.copy_(scale * noise + ("norm" in name))
    return peer.float().eval()


def our_tensors(peer, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Return the weights of transformers' model, or their gradients, under our names."""
    theirs = {n: (p.grad if gradients else p.detach()) for n, p in peer.named_parameters()}
    names = {
        "embedding.weight": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        "mixer_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
    }
    found = {ours: theirs[name] for ours, name in names.items() if name in theirs}
    for index in range(ModelConfig(**KIMI).num_layers):
        layer = f"model.layers.{index}."
        own = {n.removeprefix(layer): p for n, p in theirs.items() if n.startswith(layer)}
        mixer = {n.removeprefix("self_attn."): p for n, p in own.items() if n.startswith("self_attn.")}
        found |= {f"layers.{index}.kda.{n}": p for n, p in from_hugging_face(mixer).items()}
        found |= {f"layers.{index}.{n}": p for n, p in own.items() if n.startswith("mlp.")}
        found |= {f"layers.{index}.{ours}": own[name] for ours, name in names.items() if name in own}
    assert found.keys() == model_tensors(ModelConfig(**KIMI)).keys()
    return found
