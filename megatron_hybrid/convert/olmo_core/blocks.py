"""Layers in OLMo-core's config.json: the block of one layer, with its mixer."""

from typing import Any

from megatron_hybrid.convert.olmo_core.section import Section

_NORMS = {"default": "pre", "reordered_norm": "post", "peri_norm": "peri"}
"""Norm placement of a block by its name."""


def read_block(block: Section, index: int, count: int) -> dict[str, Any]:
    """Return the kind of layer `index` of `count` layers, and its widths and constants."""
    name = block.get("name", str, "default")
    found: dict[str, Any] = {"norm_eps": read_eps(block, "layer_norm")}
    feed_forward = block.section("feed_forward", "feed_forward")
    found["ffn_hidden_size"] = feed_forward.get("hidden_size", int, ...)
    feed_forward.done()
    mixer = block.get("sequence_mixer", dict) or block.get("attention", dict)
    block.read |= {"sequence_mixer", "attention"}
    if name == "fla_hybrid":
        found |= _old_block(block, mixer, index, count)
    elif name not in _NORMS:
        block.problems.append(f"{block.where}.name = {name!r:.50} is none of {', '.join(_NORMS)}")
    elif isinstance(mixer, dict) and mixer.get("type") == "gated_delta_net":
        section = Section(mixer, "gated_delta_net", f"{block.where}.sequence_mixer", block.problems)
        found |= {"kind": "G", "block": {"norm": _NORMS[name]}, **_gdn(section)}
    else:
        found |= _attention(_mixer(block, mixer), _NORMS[name], index, count)
    block.done()
    return found


def _old_block(block: Section, mixer: Any, index: int, count: int) -> dict[str, Any]:
    """Read a `fla_hybrid` block: fla's own layer with a norm before its parts, or attention with a norm after them."""
    indices = block.get("fla_hybrid_attention_indices", list, [])
    block.read.add("fla")
    if indices is not None and index in indices:
        return _attention(_mixer(block, mixer), "post", index, count)
    return {"kind": "G", "block": {"norm": "pre"}, **_old_gdn(block, mixer)}


def _mixer(block: Section, mixer: Any) -> Section:
    return Section(mixer, "attention", f"{block.where}.sequence_mixer", block.problems)


def _gdn(mixer: Section) -> dict[str, Any]:
    heads = mixer.get("n_heads", int, ...)
    found = {
        "gdn_heads": heads,
        "gdn_value_heads": mixer.get("n_v_heads", int, heads),
        "gdn_head_dim": mixer.get("head_dim", int),
        "gdn_expand_v": mixer.get("expand_v", (int, float), 2.0),
        "gdn_negative": mixer.get("allow_neg_eigval", bool, True),
        "gdn_conv": mixer.get("conv_size", int, 4),
        "gdn_eps": mixer.get("norm_eps", (int, float), 1e-5),
    }
    mixer.done()
    return found


def _old_gdn(block: Section, attention: Any) -> dict[str, Any]:
    """Read fla's own layer in a wrapper. It has as many heads as the attention; the rest is in its keyword arguments."""
    fla = block.section("fla", "fla")
    arguments = fla.section("fla_layer_kwargs", "fla_layer_kwargs")
    heads = attention.get("n_heads") if isinstance(attention, dict) else None
    found = {
        "gdn_heads": arguments.get("num_heads", int, heads),
        "gdn_value_heads": arguments.get("num_v_heads", int, heads),
        "gdn_head_dim": arguments.get("head_dim", int, ...),
        "gdn_expand_v": arguments.get("expand_v", (int, float), 2.0),
        "gdn_negative": arguments.get("allow_neg_eigval", bool, False),
        "gdn_conv": arguments.get("conv_size", int, 4),
        "gdn_eps": arguments.get("norm_eps", (int, float), 1e-5),
    }
    arguments.done()
    fla.done()
    return found


def _attention(mixer: Section, norm: str, index: int, count: int) -> dict[str, Any]:
    per_head = mixer.get("use_head_qk_norm", bool, False)
    found: dict[str, Any] = {
        "block": {
            "norm": norm,
            "qk_norm": "per_head" if per_head else "projection",
            "output_gate": mixer.get("gate", dict) is not None,
        },
        "heads": mixer.get("n_heads", int, ...),
        "kv_heads": mixer.get("n_kv_heads", int),
        "head_dim": mixer.get("head_dim", int),
        "qk_norm_eps": read_eps(mixer, "qk_norm"),
        "rope_theta": None,
        "rope_scaling": None,
    }
    if found["block"]["output_gate"]:
        mixer.section("gate", "gate").done()
    if mixer.get("rope", dict) is not None:
        rope = mixer.section("rope", "rope")
        found["rope_theta"] = rope.get("theta", (int, float), 500_000)
        if rope.get("scaling", dict) is not None:
            found["rope_scaling"] = _rope_scaling(rope.section("scaling", "rope_scaling"))
        rope.done()
    window = _window(mixer, index, count)
    found |= {"kind": "W" if window else "A", "window": window}
    mixer.done()
    return found


def _rope_scaling(scaling: Section) -> dict[str, Any] | None:
    """Return fields of RopeScalingConfig, with OLMo-core's defaults. Its attention factor is always the paper's."""
    kind = str(scaling.data.get("_CLASS_", "")).rpartition(".")[2]
    if kind != "YaRNRoPEScalingConfig":
        scaling.problems.append(f"{scaling.where} is {kind!r:.100}; only YaRNRoPEScalingConfig can be represented")
        return None
    found = {
        "factor": scaling.get("factor", (int, float), 8.0),
        "original_max_position_embeddings": scaling.get("old_context_len", int, 8192),
        "beta_fast": scaling.get("beta_fast", (int, float), 32),
        "beta_slow": scaling.get("beta_slow", (int, float), 1),
    }
    scaling.done()
    return found


def _window(mixer: Section, index: int, count: int) -> int | None:
    """Return how many tokens layer `index` sees, or None for all."""
    if mixer.get("sliding_window", dict) is None:
        return None
    window = mixer.section("sliding_window", "sliding_window")
    pattern = window.get("pattern", list, ...) or []
    first = window.get("force_full_attention_on_first_layer", bool, True)
    last = window.get("force_full_attention_on_last_layer", bool, True)
    window.done()
    if not pattern or not all(type(w) is int and (w > 0 or w == -1) for w in pattern):
        window.problems.append(f"{window.where}.pattern {pattern!r:.100} is not a list of window sizes, -1 for none")
        return None
    if (first and index == 0) or (last and index == count - 1):
        return None
    size = pattern[(index - 1 if first else index) % len(pattern)]
    return None if size == -1 else size


def read_eps(section: Section, name: str) -> Any:
    """Return the epsilon of the norm that a field holds."""
    norm = section.section(name, "layer_norm")
    eps = norm.get("eps", (int, float), 1e-5)
    norm.done()
    return eps
