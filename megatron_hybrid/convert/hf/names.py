"""The true tensors' names (arch/tensors.py) in transformers' `olmo_hybrid` and `olmo3` models, in every spelling met."""

import re

from megatron_hybrid.arch.model import ModelConfig

_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_NORMS = {
    "G": {
        "mixer_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    },  # pre-norm: before the mixer, before the MLP
    "A": {"mixer_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"},  # post-norm: after each
}
_LAYER = re.compile(r"layers\.(\d+)\.(\w+)\.?(.*)")


def huggingface_name(model: ModelConfig, tensor: str) -> str:
    """`layers.3.attention.q_proj.weight` -> `model.layers.3.self_attn.q_proj.weight`.

    A Gated DeltaNet's three convolutions are `linear_attn.{q,k,v}_conv1d.weight`, [channels, 1, taps] there; transformers
    joins them on load.
    """
    if tensor in _OUTSIDE:
        return _OUTSIDE[tensor]
    index, part, rest = _LAYER.fullmatch(tensor).groups()  # type: ignore[union-attr]
    prefix, kind = f"model.layers.{index}", "G" if model.layers[int(index)] == "G" else "A"
    if part in _NORMS[kind]:
        return f"{prefix}.{_NORMS[kind][part]}.{rest}"
    if part == "gdn":
        rest = rest.replace("gate_proj", "g_proj").replace("_conv.", "_conv1d.")
    return f"{prefix}.{ {'gdn': 'linear_attn', 'attention': 'self_attn', 'mlp': 'mlp'}[part] }.{rest}"


_OTHER_SPELLINGS = {
    "G": {
        # the released checkpoints, and whatever transformers' save_pretrained wrote
        "attention_layer_norm.weight": "input_layernorm.weight",
        "feedforward_layer_norm.weight": "post_attention_layernorm.weight",
        # OLMo-core 3.0.0's exporter
        "linear_attn.out_proj.weight": "linear_attn.o_proj.weight",
        "linear_attn.norm.weight": "linear_attn.o_norm.weight",
    },
    # save_pretrained reverses its load-time renames for every layer, the attention layers included
    "A": {"feedforward_layer_norm.weight": "post_attention_layernorm.weight"},
}
_THEIR_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.(.+)")


def usual_name(model: ModelConfig, theirs: str) -> str:
    """A name in any spelling -> the one that `huggingface_name` gives. Other names, known or not, stay as they are."""
    match = _THEIR_LAYER.fullmatch(theirs)
    if not match or int(match[1]) >= model.num_layers:
        return theirs
    kind = "G" if model.layers[int(match[1])] == "G" else "A"
    return f"model.layers.{match[1]}.{_OTHER_SPELLINGS[kind].get(match[2], match[2])}"
