"""config.json of OLMo-core (3.0, and older versions with `fla_hybrid` blocks) to ModelConfig. Every field is accounted for."""

from typing import Any

from pydantic import ValidationError

from megatron_hybrid.arch.model import ModelConfig, fold_pattern
from megatron_hybrid.config.translate import translate
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.olmo_core.section import Section


def model_from_olmo_core(
    config: dict[str, Any], eos_token_id: int | None = None, pad_token_id: int | None = None
) -> ModelConfig:
    """Return the model that an OLMo-core run's config.json describes.

    Raises:
        ConversionError: lists every field that is unknown, missing, or not representable.
    """
    problems: list[str] = []
    data = config.get("model", config if "d_model" in config else None)
    model = Section(data, "model", "model", problems)
    count = model.get("n_layers", int, ...)
    blocks = _blocks(model, count) if count and 0 < count <= 4096 else []
    if not blocks and not problems:
        problems.append(f"model.n_layers {count!r} is not from 1 to 4096")
    layers = [_block(block, index, len(blocks)) for index, block in enumerate(blocks)]
    head = model.section("lm_head", "lm_head")
    fields: dict[str, Any] = {
        "hidden_size": model.get("d_model", int, ...),
        "vocab_size": model.get("vocab_size", int, ...),
        "init_std": model.get("init_std", (int, float), 0.02),
        "tie_embeddings": model.get("tie_word_embeddings", bool, False),
        "norm_eps": _eps(head, "layer_norm"),
    }
    head.done()
    model.done()
    if not problems:
        fields |= _combine(layers, fields, problems)
    tokenizer = config.get("dataset", {}).get("tokenizer", {}) if isinstance(config.get("dataset"), dict) else {}
    tokenizer = tokenizer if isinstance(tokenizer, dict) else {}
    fields["eos_token_id"] = eos_token_id if eos_token_id is not None else tokenizer.get("eos_token_id")
    fields["pad_token_id"] = pad_token_id if pad_token_id is not None else tokenizer.get("pad_token_id")
    if problems:
        raise ConversionError("config.json: " + "; ".join(dict.fromkeys(problems[:10])))
    try:
        for name in ("init_std", "norm_eps", "rope_theta"):
            fields[name] = None if fields[name] is None else float(fields[name])
        if scaling := fields["rope_scaling"]:
            scaling |= {name: float(scaling[name]) for name in ("factor", "beta_fast", "beta_slow")}
        return ModelConfig.model_validate(fields)
    except OverflowError:
        raise ConversionError("config.json: a number is out of range") from None
    except ValidationError as error:
        raise ConversionError(f"config.json: {str(translate(error, ModelConfig))[:2000]}") from None


def _blocks(model: Section, count: int) -> list[Section]:
    """Return the configuration of each layer's block."""
    block, pattern, overrides = (
        model.get("block", dict, ...) or {},
        model.get("block_pattern", list),
        model.get("block_overrides", dict, {}),
    )
    if pattern is not None:
        if not pattern or not all(isinstance(name, str) and name in block for name in pattern):
            model.problems.append(f"model.block_pattern {pattern!r:.100} names blocks that model.block does not have")
            return []
        names = [pattern[i % len(pattern)] for i in range(count)]
        return [Section(block[name], "block", f"model.block.{name}", model.problems) for name in names]
    chosen = [(block, "model.block")] * count
    for index, other in (overrides or {}).items():
        if not index.isdecimal() or len(index) > 9 or int(index) >= count:
            model.problems.append(f"model.block_overrides has no layer {index!r:.50}")
            return []
        chosen[int(index)] = (other, f"model.block_overrides.{index}")
    return [Section(data, "block", where, model.problems) for data, where in chosen]


def _block(block: Section, index: int, count: int) -> dict[str, Any]:
    """Return the kind of one layer, and its widths and constants."""
    name = block.get("name", str, "default")
    found: dict[str, Any] = {"norm_eps": _eps(block, "layer_norm")}
    feed_forward = block.section("feed_forward", "feed_forward")
    found["ffn_hidden_size"] = feed_forward.get("hidden_size", int, ...)
    feed_forward.done()
    old = name == "fla_hybrid"
    indices = block.get("fla_hybrid_attention_indices", list, []) if old else None
    mixer = block.get("sequence_mixer", dict) or block.get("attention", dict)
    block.read |= {"sequence_mixer", "attention"}
    linear = (
        index not in indices
        if old and indices is not None
        else isinstance(mixer, dict) and mixer.get("type") == "gated_delta_net"
    )
    wanted = "default" if linear else "reordered_norm"
    if not old and name != wanted:
        norm = "before" if linear else "after"
        block.problems.append(
            f"{block.where}.name = {name!r:.50}: a block with its norms {norm} its parts is needed, {wanted!r}"
        )
    if old:
        block.read.add("fla")
    if linear:
        found |= {"kind": "G"} | (
            _old_gdn(block, mixer)
            if old
            else _gdn(Section(mixer, "gated_delta_net", f"{block.where}.sequence_mixer", block.problems))
        )
    else:
        found |= _attention(Section(mixer, "attention", f"{block.where}.sequence_mixer", block.problems), index, count)
    block.done()
    return found


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


def _attention(mixer: Section, index: int, count: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "heads": mixer.get("n_heads", int, ...),
        "kv_heads": mixer.get("n_kv_heads", int),
        "head_dim": mixer.get("head_dim", int),
        "qk_norm_eps": _eps(mixer, "qk_norm"),
        "rope_theta": None,
        "rope_scaling": None,
    }
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


def _eps(section: Section, name: str) -> Any:
    norm = section.section(name, "layer_norm")
    eps = norm.get("eps", (int, float), 1e-5)
    norm.done()
    return eps


def _combine(layers: list[dict[str, Any]], fields: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the fields that ModelConfig has once for all layers. Adds a problem if layers differ."""

    def same(name: str, default: Any = None) -> Any:
        values = {layer[name] for layer in layers if layer.get(name) is not None}
        if len(values) > 1:
            problems.append(f"layers differ in {name}: {sorted(values)!r:.100}; one value for all can be represented")
        return values.pop() if values else default

    eps = {layer[name] for layer in layers for name in ("norm_eps", "qk_norm_eps") if name in layer} | {
        fields["norm_eps"]
    }
    if len(eps) > 1:
        problems.append(f"norms have different eps: {sorted(eps)!r:.100}; one value for all can be represented")
    attention = [layer for layer in layers if layer["kind"] != "G"]
    if len({layer["rope_theta"] for layer in attention}) > 1:
        problems.append("attention layers differ in rope; one theta for all can be represented")
    full = [layer["rope_scaling"] for layer in attention if layer["kind"] == "A"]
    if any(scaling != full[0] for scaling in full) or any(
        layer["rope_scaling"] for layer in attention if layer["kind"] == "W"
    ):
        problems.append(
            "attention layers differ in rope scaling; one for full attention, none for sliding can be represented"
        )
    hidden, gdn_heads = fields["hidden_size"], same("gdn_heads")
    heads = same("heads", gdn_heads)
    head_dim, kv_heads = same("head_dim"), same("kv_heads")
    result = {
        "layer_pattern": fold_pattern([layer["kind"] for layer in layers]),
        "ffn_hidden_size": same("ffn_hidden_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": None if kv_heads == heads else kv_heads,
        "head_dim": None if head_dim and head_dim * heads == hidden else head_dim,
        "rope_theta": attention[0]["rope_theta"] if attention else None,
        "rope_scaling": full[0] if full else None,
        "sliding_window": same("window"),
        "gdn": None,
    }
    if gdn_heads is not None:
        key_dim = same("gdn_head_dim", hidden // gdn_heads if gdn_heads > 0 else None)
        expand, conv, negative = same("gdn_expand_v"), same("gdn_conv"), same("gdn_negative")
        result["gdn"] = {
            "num_key_heads": gdn_heads,
            "num_value_heads": same("gdn_value_heads"),
            "key_head_dim": key_dim,
            "value_head_dim": int(key_dim * expand) if key_dim and 0 < expand < 1e6 else None,
            "conv_kernel_size": conv,
            "allow_negative_eigenvalues": negative,
            "norm_eps": float(same("gdn_eps")),
        }
    return result
