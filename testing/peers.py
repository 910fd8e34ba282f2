"""transformers' models at our configurations, to compare with."""

import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.convert.hf.config import hf_from_model
from megatron_hybrid.convert.hf.registry import architecture_for
from testing.small_peer import SmallHybrid


def transformers_model(model: ModelConfig, seed: int = 0):
    """transformers' model of the same architecture in fp32, every weight random. For AI2's small suite, which transformers lacks,
    it is built from parts of transformers and torch.
    """
    make = qwen_model if model.zero_centered_norm else SmallHybrid if model.embedding_norm else olmo_model
    peer = make(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                zero_centered = model.zero_centered_norm and "linear_attn" not in name
                parameter.copy_((not zero_centered) + 0.1 * noise)
            elif "A_log" in name:
                parameter.copy_(noise)
            elif "conv1d" in name:
                parameter.copy_(0.4 * noise)
            else:
                parameter.copy_(0.05 * noise)
    return peer.float().eval()


def qwen_model(model: ModelConfig):
    """Qwen3_5ForCausalLM."""
    import transformers

    config = hf_from_model(model, "float32", 4096)
    config = {name: value for name, value in config.items() if name not in ("architectures", "model_type", "dtype")}
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**config, attn_implementation="eager"))


def olmo_model(model: ModelConfig):
    """OlmoHybridForCausalLM, or Olmo3ForCausalLM where the model has no Gated DeltaNet."""
    import transformers

    plain = {"rope_type": "default", "rope_theta": model.rope_theta}  # a null theta: no rotary embedding
    scaling = model.rope_scaling.model_dump(exclude_none=True) if model.rope_scaling else None
    full = plain | scaling if scaling else plain
    common = dict(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        rope_parameters=full,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    if "G" in model.layers:
        gdn = model.gdn
        config = transformers.OlmoHybridConfig(
            **common,
            layer_types=["linear_attention" if k == "G" else "full_attention" for k in model.layers],
            linear_num_key_heads=gdn.num_key_heads,
            linear_num_value_heads=gdn.num_value_heads,
            linear_key_head_dim=gdn.key_head_dim,
            linear_value_head_dim=gdn.value_head_dim,
            linear_allow_neg_eigval=gdn.allow_negative_eigenvalues,
        )
        return transformers.OlmoHybridForCausalLM(config)
    else:
        common["rope_parameters"] = {"full_attention": full, "sliding_attention": plain}
        config = transformers.Olmo3Config(
            **common,
            layer_types=["sliding_attention" if k == "W" else "full_attention" for k in model.layers],
            sliding_window=model.sliding_window or 4096,  # it makes that mask for full attention alone, too
        )
        return transformers.Olmo3ForCausalLM(config)


def true_tensors_of(peer, model: ModelConfig, gradients: bool = False) -> dict[str, torch.Tensor]:
    """The peer's weights, or their gradients, under our names."""
    theirs = {n: (p.grad if gradients else p.detach()) for n, p in peer.named_parameters()}
    names = architecture_for(model).names(model)
    found = {}
    for name, spec in model_tensors(model).items():
        joined, holder = names.joined(name), names.holder(name)
        if joined is not None:  # OLMo Hybrid's exports have its parts
            parts = [theirs[joined.joined][joined.first : joined.first + spec.shape[0]]]
        else:
            parts = [theirs[holder.name][rows.at : rows.at + rows.count] for rows in holder.rows if rows.ours == name]
        found[name] = torch.cat(parts).reshape(spec.shape)
    return found


def transformers_count(model: ModelConfig) -> int:
    """Parameters of transformers' model, made on the meta device."""
    from transformers import AutoModelForCausalLM, Olmo3Config, OlmoHybridConfig

    if model.zero_centered_norm:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in qwen_model(model).parameters())

    kinds = {"G": "linear_attention", "A": "full_attention", "W": "sliding_attention"}
    shared = dict(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        layer_types=[kinds[kind] for kind in model.layers],
        tie_word_embeddings=model.tie_embeddings,
        pad_token_id=None,
    )
    config: OlmoHybridConfig | Olmo3Config
    if model.gdn is not None:
        config = OlmoHybridConfig(
            **shared,
            linear_num_key_heads=model.gdn.num_key_heads,
            linear_num_value_heads=model.gdn.num_value_heads,
            linear_key_head_dim=model.gdn.key_head_dim,
            linear_value_head_dim=model.gdn.value_head_dim,
        )
    else:
        config = Olmo3Config(**shared)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
