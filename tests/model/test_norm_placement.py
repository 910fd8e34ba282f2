"""Norms before, after and around sublayers, and zero-centered ones, by what they must leave unchanged."""

import pytest
import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.model.initialize import initial_value
from testing import jobs
from testing.models import hybrid

TOKENS = torch.randint(97, (1, 24), generator=torch.Generator().manual_seed(1))


def with_norm(norm: str, **more) -> dict:
    """The norms' epsilon is far below what sublayers return."""
    blocks = {"G": {"norm": norm}, "A": {"norm": norm}}
    return hybrid("GA", 32, 2, 8, vocab_size=97, blocks=blocks, norm_eps=1e-12, init_std=0.2, **more)


def tensors_of(fields: dict) -> dict[str, torch.Tensor]:
    model = ModelConfig(**fields)
    return {name: initial_value(spec, model, seed=0) for name, spec in model_tensors(model).items()}


def run(ranks, fields: dict, tensors: dict) -> dict:
    return ranks.run(jobs.logits_and_gradients, 1, model=fields, tensors=tensors, tokens=TOKENS)[0]


@pytest.mark.parametrize("norm", ["pre", "post", "peri"])
def test_a_norm_behind_a_sublayer_hides_the_scale_of_its_output(norm, ranks):
    fields = with_norm(norm)
    tensors = tensors_of(fields)
    larger = {n: 4 * t if n.endswith(("o_proj.weight", "down_proj.weight")) else t for n, t in tensors.items()}
    base, scaled = run(ranks, fields, tensors), run(ranks, fields, larger)
    difference = (scaled["logits"] - base["logits"]).norm() / base["logits"].norm()
    assert (difference < 1e-4) == (norm != "pre"), difference
    norms = [name for name in tensors if name.endswith("_norm.weight") and "mixer" in name or "mlp_norm" in name]
    assert len(norms) == (8 if norm == "peri" else 4)
    assert all(base["gradients"][name].abs().sum() > 0 for name in norms)


@pytest.mark.parametrize("norm", ["pre", "peri"])
def test_zero_centered_norms_are_plain_ones_with_one_more(norm, ranks):
    plain, centered = with_norm(norm), with_norm(norm, zero_centered_norm=True)
    tensors = tensors_of(centered)
    shifted = {name for name, value in tensors.items() if name.endswith("norm.weight") and not value.any()}
    assert len(shifted) == (11 if norm == "peri" else 7)  # with q's, k's and the final one, without the delta rule's
    tensors |= {n: 0.1 * torch.randn(tensors[n].shape, generator=torch.Generator().manual_seed(2)) for n in shifted}
    found = run(ranks, centered, tensors)
    expected = run(ranks, plain, {n: t + (n in shifted) for n, t in tensors.items()})
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-5, atol=1e-6)
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-7)
