"""Our model is transformers' `olmo_hybrid`, `olmo3` and `qwen3_5`: the same logits and the same gradients from the same weights."""

import pytest

from testing.fidelity import CASES, compare


@pytest.mark.parametrize("case", CASES)
def test_same_as_transformers(case, ranks):
    logits, gradients = compare(case, ranks)
    assert logits < 1e-5
    for name, error in gradients.items():
        assert error < 1e-4, f"{name}: {error:.1e}"
