"""Model of AI2's small hybrid suite in plain torch and transformers' Gated DeltaNet, to compare with.

Parameters have the names of `MainlineLadderForCausalLM`, AI2's class.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from megatron_hybrid.arch.model import ModelConfig


class GatedAttention(nn.Module):
    """Causal attention with a norm per head, without positions, times the sigmoid of a gate in fp32."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        h, self.dim = model.hidden_size, model.attention_head_dim
        query, key = model.num_attention_heads * self.dim, model.kv_heads * self.dim
        widths = {"q_proj": query, "k_proj": key, "v_proj": key, "attn_gate": query}
        for name, width in widths.items():
            self.add_module(name, nn.Linear(h, width, bias=False))
        self.o_proj = nn.Linear(query, h, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(self.dim, eps=model.norm_eps) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, is_causal=True, enable_gqa=True)
        gate = torch.sigmoid(self.attn_gate(x).float())
        return self.o_proj(out.transpose(1, 2).flatten(2) * gate)


class Layer(nn.Module):
    """Mixer and MLP, each with a norm before and a norm behind it."""

    def __init__(self, model: ModelConfig, index: int, config) -> None:
        from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet, OlmoHybridMLP

        super().__init__()
        linear = model.layers[index] == "G"
        self.mixer = "linear_attn" if linear else "self_attn"
        self.add_module(self.mixer, OlmoHybridGatedDeltaNet(config, index) if linear else GatedAttention(model))
        self.mlp = OlmoHybridMLP(config)
        for name in ("input", "post_attention", "ffn", "post_feedforward"):
            self.add_module(f"{name}_layernorm", nn.RMSNorm(model.hidden_size, eps=model.norm_eps))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.post_attention_layernorm(getattr(self, self.mixer)(self.input_layernorm(x)))
        return x + self.post_feedforward_layernorm(self.mlp(self.ffn_layernorm(x)))


class SmallHybrid(nn.Module):
    """The whole model: tokens [b, s] -> an object with `logits` [b, s, vocabulary]."""

    def __init__(self, model: ModelConfig) -> None:
        import transformers

        super().__init__()
        gdn, h = model.gdn, model.hidden_size
        config = transformers.OlmoHybridConfig(
            hidden_size=h,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            layer_types=["linear_attention" if symbol == "G" else "full_attention" for symbol in model.layers],
            linear_num_key_heads=gdn.num_key_heads,
            linear_num_value_heads=gdn.num_value_heads,
            linear_key_head_dim=gdn.key_head_dim,
            linear_value_head_dim=gdn.value_head_dim,
            linear_allow_neg_eigval=gdn.allow_negative_eigenvalues,
        )
        self.scale = model.embed_scale
        self.model = nn.ModuleDict(
            dict(
                embed_tokens=nn.Embedding(model.vocab_size, h),
                embed_norm=nn.RMSNorm(h, eps=model.norm_eps),
                layers=nn.ModuleList(Layer(model, index, config) for index in range(model.num_layers)),
                norm=nn.RMSNorm(h, eps=model.norm_eps),
            )
        )
        self.lm_head = nn.Linear(h, model.vocab_size, bias=False)
        if model.tie_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight

    def forward(self, tokens: torch.Tensor) -> SimpleNamespace:
        x = self.model["embed_norm"](self.model["embed_tokens"](tokens) * self.scale)
        for layer in self.model["layers"]:
            x = layer(x)
        return SimpleNamespace(logits=self.lm_head(self.model["norm"](x)))
