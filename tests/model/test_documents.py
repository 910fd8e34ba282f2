"""A packed row computes what its documents compute alone: logits and every gradient. Leaks of a thousandth are found."""

import pytest

from testing.document_parity import CASES, LEAKS_OF, against_transformers, parity
from testing.documents import RAGGED

LOGITS, GRADIENTS = 1e-5, 1e-4


def exceeded(found: dict) -> dict[str, float]:
    """Return the errors that are above the tolerances."""
    logits = {name: found[name] for name in ("logits", "worst token") if name in found}
    wrong = {name: error for name, error in logits.items() if not error < LOGITS}
    return wrong | {name: error for name, error in found["gradients"].items() if not error < GRADIENTS}


@pytest.mark.parametrize("case", CASES)
def test_packed_rows_are_their_documents_alone(case, ranks):
    (found,) = ranks.run(parity, 1, model=CASES[case], rows=RAGGED)
    assert not exceeded(found)


@pytest.mark.parametrize("leak", LEAKS_OF)
def test_a_leak_of_a_thousandth_is_found(leak, ranks):
    """The leak is in one kind of layer. Logits and gradients both show it."""
    (found,) = ranks.run(parity, 1, model=CASES[LEAKS_OF[leak]], rows=RAGGED, leak=leak)
    wrong = exceeded(found)
    assert "logits" in wrong and set(wrong) & set(found["gradients"])


def test_same_as_transformers_document_by_document(ranks):
    assert not exceeded(against_transformers(ranks))
