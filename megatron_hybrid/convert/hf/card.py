"""README.md of an exported model."""

from collections import Counter
from typing import Any

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.checkpoint.format import Index
from megatron_hybrid.convert.hf.base import Architecture

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

```bash
vllm serve PATH{flags}
```
{serving}
| | |
|---|---|
{table}

Exported by megatron_hybrid's `megatron-hybrid convert to-hf`. Fill in what the weights were trained on, their licence and their
limits before publishing them.
"""

_SERVING = """
vLLM needs `{flags}`, or a recurrent state in fp32. Without either, its scores drop sharply.
"""


def model_card(
    model: ModelConfig, architecture: Architecture, config: dict[str, Any], index: Index, has_tokenizer: bool
) -> str:
    """Return a model card in Hugging Face's form. What is not known is left to its author.

    Args:
        config: the export's config.json.
        index: index of the checkpoint.
    """
    counts = Counter(model.known_blocks[symbol].title for symbol in model.layers)
    step = index.state.get("step")
    rows = {
        "layers": f"`{model.layer_pattern}`",
        "attention heads": f"{model.num_attention_heads} of {model.attention_head_dim}, {model.kv_heads} for keys and values",
        "rotary embedding": f"theta {model.rope_theta:,.0f}{_scaling(model)}" if model.rope_theta else "none",
        "weights": config["dtype"],
        "embeddings": "tied" if model.tie_embeddings else "untied",
        **architecture.card_rows(model),
    }
    return _CARD.format(
        model_type=architecture.model_type,
        title=architecture.class_name,
        parameters=sum(spec.numel for spec in model_tensors(model).values()),
        layers=model.num_layers,
        kinds=", ".join(f"{count} {name}" for name, count in counts.items()),
        hidden=model.hidden_size,
        vocabulary=model.vocab_size,
        origin=f"Trained with megatron_hybrid, step {step}." if step else "",
        import_tokenizer=", AutoTokenizer" if has_tokenizer else "",
        load_tokenizer='tokenizer = AutoTokenizer.from_pretrained("PATH")\n' if has_tokenizer else "",
        flags=f" {architecture.vllm_flags}" if architecture.vllm_flags else "",
        serving=_SERVING.format(flags=architecture.vllm_flags) if architecture.vllm_flags else "",
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    )


def _scaling(model: ModelConfig) -> str:
    scaling = model.rope_scaling
    return f", YaRN factor {scaling.factor:g} of {scaling.original_max_position_embeddings}" if scaling else ""
