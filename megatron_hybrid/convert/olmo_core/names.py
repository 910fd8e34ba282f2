"""Names of true tensors (arch/tensors.py) in OLMo-core's checkpoints."""

import re

HEAD = "lm_head.w_out.weight"
_OUTSIDE = {
    "embedding.weight": "embeddings.weight", "embedding_norm.weight": "embedding_norm.weight",
    "final_norm.weight": "lm_head.norm.weight", "output.weight": HEAD,
}  # fmt: skip
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_BLOCK = {
    "mixer_norm": "attention_norm", "mlp_norm": "feed_forward_norm",
    "post_mixer_norm": "post_attention_norm", "post_mlp_norm": "post_feed_forward_norm", "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
}  # fmt: skip
_MIXER = {
    "gate_proj": "w_g",
    "o_proj": "w_out",
    **{f"{p}_proj": f"w_{p}" for p in "qkvab"},
    **{f"{p}_conv": f"{p}_conv1d" for p in "qkv"},
}
_OLD_MIXER = {"gate_proj": "g_proj", **{f"{p}_conv": f"{p}_conv1d" for p in "qkv"}}


def olmo_core_names(tensor: str) -> list[str]:
    """Return a true tensor's name in OLMo-core 3.0 and, if it differs, in versions that wrapped fla's own layer.

    Those versions name the tensors of Gated DeltaNet layers `blocks.i.fla.inner.*`.
    """
    if tensor in _OUTSIDE:
        return [_OUTSIDE[tensor]]
    match = _LAYER.fullmatch(tensor)
    assert match is not None
    prefix, rest = f"blocks.{match[1]}", match[2]
    mixer, _, part = rest.partition(".")
    if mixer in ("gdn", "attention"):
        stem, dot, suffix = part.partition(".")
        names = [f"{prefix}.attention.{_MIXER.get(stem, stem)}{dot}{suffix}"]
        return [*names, f"{prefix}.fla.inner.{_OLD_MIXER.get(stem, stem)}{dot}{suffix}"] if mixer == "gdn" else names
    stem = rest.removesuffix(".weight")
    names = [f"{prefix}.{_BLOCK[stem]}.weight"]
    return [*names, f"{prefix}.fla_norm.weight"] if stem == "mixer_norm" else names


def is_convolution(tensor: str) -> bool:
    """Return whether a true tensor is [channels, taps], and [channels, 1, taps] in OLMo-core."""
    return tensor.endswith("_conv.weight")
