"""README.md of an exported model."""

from collections import Counter
from typing import Any

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.checkpoint.format import Index

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- {model_type}
- megatron-hybrid
---

# {title}

{parameters:,} parameters, {layers} layers ({kinds}), hidden size {hidden}, vocabulary {vocabulary:,}. {origin}

```python
from transformers import AutoModelForCausalLM{import_tokenizer}

model = AutoModelForCausalLM.from_pretrained("PATH")
{load_tokenizer}```

| | |
|---|---|
{table}

Exported by megatron_hybrid's `tools/convert_to_hf.py`. Fill in what the weights were trained on, their licence and their
limits before publishing them.
"""


def model_card(model: ModelConfig, config: dict[str, Any], index: Index, has_tokenizer: bool) -> str:
    """What is known of the model, in Hugging Face's form; what is not known is left for its author."""
    counts = Counter(model.known_blocks[symbol].title for symbol in model.layers)
    step = index.state.get("step") if isinstance(index.state, dict) else None
    rows = {
        "layers": f"`{model.layer_pattern}`",
        "attention heads": f"{model.num_attention_heads} of {model.attention_head_dim}, {model.kv_heads} for keys and values",
        "rotary embedding": f"theta {model.rope_theta:,.0f}{_scaling(model)}" if model.rope_theta else "none",
        "weights": config["dtype"],
        "embeddings": "tied" if model.tie_embeddings else "untied",
    }
    if model.gdn and "G" in model.layers:
        gdn = model.gdn
        rows["Gated DeltaNet"] = (
            f"{gdn.num_key_heads} key heads of {gdn.key_head_dim}, {gdn.num_value_heads} value heads of {gdn.value_head_dim}"
        )
    return _CARD.format(
        model_type=config["model_type"],
        title=config["architectures"][0],
        parameters=sum(spec.numel for spec in model_tensors(model).values()),
        layers=model.num_layers,
        kinds=", ".join(f"{count} {name}" for name, count in counts.items()),
        hidden=model.hidden_size,
        vocabulary=model.vocab_size,
        origin=f"Trained with megatron_hybrid, step {step}." if step else "",
        import_tokenizer=", AutoTokenizer" if has_tokenizer else "",
        load_tokenizer='tokenizer = AutoTokenizer.from_pretrained("PATH")\n' if has_tokenizer else "",
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    )


def _scaling(model: ModelConfig) -> str:
    scaling = model.rope_scaling
    return f", YaRN factor {scaling.factor:g} of {scaling.original_max_position_embeddings}" if scaling else ""
