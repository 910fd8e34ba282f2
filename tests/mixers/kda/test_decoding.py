"""Logits from prompts in chunks and single tokens against a full forward pass, at every position of unequal sequences."""

import pytest

from tests.mixers.kda import jobs
from tests.mixers.kda.models import MODEL


@pytest.mark.parametrize("count", [1, 2], ids=["one rank", "TP2, padded head"])
def test_agrees_with_transformers(count, ranks):
    pytest.importorskip("transformers.models.kimi_linear")
    for errors in ranks.run(jobs.decoding_errors_against_transformers, count, tensor_parallel_size=count):
        assert max(errors) < 1e-5, errors


@pytest.mark.parametrize("more", [{}, dict(gate_lower_bound=-5.0, allow_negative_eigenvalues=True)])
def test_agrees_with_training(more, ranks):
    """Next to attention, with another rank and values wider than keys."""
    model = MODEL | dict(kda=MODEL["kda"] | more)
    (errors,) = ranks.run(jobs.decoding_errors_against_training, 1, model=model)
    assert max(errors) < 1e-5, errors
