"""Logits of Hugging Face folders, by whatever transformers is found first; imports nothing of this project.

python tests/convert/logits_of.py TOKENS.safetensors OUTPUT.safetensors FOLDER...
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def logits(folder: str, tokens: torch.Tensor) -> torch.Tensor:
    """Logits in fp32, of a model that can also generate."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    prompt = tokens[:, :8]
    longer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, min_new_tokens=12)
    assert longer.shape[1] == 20
    with torch.no_grad():
        return model(tokens).logits


if __name__ == "__main__":
    tokens, output, *folders = sys.argv[1:]
    save_file({Path(f).name: logits(f, load_file(tokens)["tokens"]).contiguous() for f in folders}, output)
