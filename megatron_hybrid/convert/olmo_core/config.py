"""config.json of OLMo-core (3.0, and older versions with `fla_hybrid` blocks) to ModelConfig. Every field is accounted for."""

from typing import Any

from pydantic import ValidationError

from megatron_hybrid.arch.model import ModelConfig, fold_pattern
from megatron_hybrid.arch.registry import default_blocks
from megatron_hybrid.config.translate import translate
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.olmo_core.blocks import read_block, read_eps
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
    layers = [read_block(block, index, len(blocks)) for index, block in enumerate(blocks)]
    head = model.section("lm_head", "lm_head")
    fields: dict[str, Any] = {
        "hidden_size": model.get("d_model", int, ...),
        "vocab_size": model.get("vocab_size", int, ...),
        "init_std": model.get("init_std", (int, float), 0.02),
        "tie_embeddings": model.get("tie_word_embeddings", bool, False),
        "norm_eps": read_eps(head, "layer_norm"),
        "embed_scale": model.get("embed_scale", (int, float), 1.0),
        "embedding_norm": model.get("embedding_norm", dict) is not None,
    }
    embedding_eps = read_eps(model, "embedding_norm") if fields["embedding_norm"] else fields["norm_eps"]
    head.done()
    model.done()
    if not problems:
        fields |= _combine(layers, fields, {fields["norm_eps"], embedding_eps}, problems)
    tokenizer = config.get("dataset", {}).get("tokenizer", {}) if isinstance(config.get("dataset"), dict) else {}
    tokenizer = tokenizer if isinstance(tokenizer, dict) else {}
    fields["eos_token_id"] = eos_token_id if eos_token_id is not None else tokenizer.get("eos_token_id")
    fields["pad_token_id"] = pad_token_id if pad_token_id is not None else tokenizer.get("pad_token_id")
    if problems:
        raise ConversionError("config.json: " + "; ".join(dict.fromkeys(problems[:10])))
    try:
        for name in ("init_std", "norm_eps", "rope_theta", "embed_scale"):
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


def _combine(
    layers: list[dict[str, Any]], fields: dict[str, Any], eps: set[Any], problems: list[str]
) -> dict[str, Any]:
    """Return the fields that ModelConfig has once for all layers. Adds a problem if layers differ.

    Args:
        eps: epsilons of the norms outside the layers.
    """

    def same(name: str, default: Any = None) -> Any:
        values = {layer[name] for layer in layers if layer.get(name) is not None}
        if len(values) > 1:
            problems.append(f"layers differ in {name}: {sorted(values)!r:.100}; one value for all can be represented")
        return values.pop() if values else default

    eps = eps | {layer[name] for layer in layers for name in ("norm_eps", "qk_norm_eps") if name in layer}
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
        "blocks": _changed_blocks(layers, problems),
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


def _changed_blocks(layers: list[dict[str, Any]], problems: list[str]) -> dict[str, Any]:
    """Return the blocks that differ from those that mixers bring. Adds a problem if layers of one kind differ."""
    changed, defaults = {}, default_blocks()
    for kind in dict.fromkeys(layer["kind"] for layer in layers):
        first, *others = [layer["block"] for layer in layers if layer["kind"] == kind]
        if any(other != first for other in others):
            problems.append(
                f"{defaults[kind].title} layers differ in norm placement, QK norm or gate; one kind can be represented"
            )
        block = defaults[kind].model_dump() | first
        if block != defaults[kind].model_dump():
            changed[kind] = block
    return changed
