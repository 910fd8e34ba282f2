"""Compare logits and gradients of our model with those of transformers, from the same weights."""

import torch

from megatron_hybrid.arch.model import ModelConfig
from testing import jobs
from testing.models import hybrid, qwen, small
from testing.peers import transformers_model, true_tensors_of

BASE = hybrid("GGGA", 48, 4, 12)
GDN = BASE["gdn"]
SMALL = small("GGGGA", 48, 6, 3, 16)
QWEN = qwen("GGGA", 48, 6, 3, 16, 3)
YARN = dict(factor=8.0, original_max_position_embeddings=16)
CASES = {
    "rope": BASE,
    "nope": BASE | dict(rope_theta=None),
    "grouped values": BASE | dict(gdn=GDN | dict(num_key_heads=2)),
    "grouped queries": BASE | dict(num_key_value_heads=2),
    "tied": BASE | dict(tie_embeddings=True),
    "odd heads": BASE
    | dict(num_attention_heads=3, gdn=dict(num_key_heads=5, num_value_heads=5, key_head_dim=8, value_head_dim=16)),
    "positive eigenvalues": BASE | dict(gdn=GDN | dict(allow_negative_eigenvalues=False)),
    "attention first": BASE | dict(layer_pattern="AGAG"),
    "sliding window": BASE | dict(layer_pattern="WWWA", gdn=None, sliding_window=16),
    "qwen": QWEN,
    "qwen, untied, all heads": QWEN | dict(tie_embeddings=False, num_key_value_heads=None, layer_pattern="AGA"),
    "small suite": SMALL,
    "small suite, tied, all heads": SMALL | dict(tie_embeddings=True, num_key_value_heads=None, layer_pattern="AGA"),
    "yarn": BASE | dict(rope_scaling=YARN),
    "yarn and sliding windows": BASE
    | dict(
        layer_pattern="WAWA",
        gdn=None,
        sliding_window=16,
        rope_theta=1e4,
        rope_scaling=YARN | dict(attention_factor=1.4, beta_fast=8.0, beta_slow=0.5),
    ),
}


def compare(case: str, ranks) -> tuple[float, dict[str, float]]:
    """Relative errors (L2) of our logits, and of the gradient of every tensor, from transformers'."""
    config = ModelConfig(**CASES[case])
    peer = transformers_model(config)
    tokens = torch.randint(0, config.vocab_size, (2, 80), generator=torch.Generator().manual_seed(1))
    theirs = peer(tokens).logits
    torch.nn.functional.cross_entropy(theirs.flatten(0, 1), tokens.flatten()).backward()
    expected = true_tensors_of(peer, config, gradients=True)
    (ours,) = ranks.run(
        jobs.logits_and_gradients, 1, model=CASES[case], tensors=true_tensors_of(peer, config), tokens=tokens
    )
    logits = ours["logits"][..., : config.vocab_size]
    assert ours["gradients"].keys() == expected.keys()
    errors = {
        name: ((ours["gradients"][name] - gradient).norm() / gradient.norm()).item()
        for name, gradient in expected.items()
    }
    return ((logits - theirs).norm() / theirs.norm()).item(), errors
