"""gated_delta_step in plain torch against the recurrence, token by token."""

import pytest
import torch

from hybrid_kernels.gated_delta_rule.reference import gated_delta_rule_recurrent
from hybrid_kernels.gated_delta_step import gated_delta_step
from hybrid_kernels.testing import HARD_CASES, delta_rule_inputs, kda_inputs, relative_error


def steps(inputs: list[torch.Tensor], state: torch.Tensor, **options) -> torch.Tensor:
    return torch.stack([gated_delta_step(*(x[:, t] for x in inputs), state, **options) for t in range(6)], 1)


@pytest.mark.parametrize("case", [*HARD_CASES, None])
@pytest.mark.parametrize("draw", [delta_rule_inputs, kda_inputs], ids=["a decay per head", "a decay per channel"])
def test_equals_the_recurrence(draw, case):
    inputs = draw(2, 6, 2, 4, 6, 10, dtype=torch.float64, **HARD_CASES.get(case, {}))
    start = torch.randn(2, 4, 6, 10, dtype=torch.float64)
    expected, final = gated_delta_rule_recurrent(*inputs, initial_state=start, output_final_state=True)
    state = start.clone()
    assert relative_error(steps(inputs, state), expected) < 1e-12
    assert relative_error(state, final) < 1e-12


def test_refuses_what_does_not_fit():
    q, k, v, g, beta = (x[:, 0] for x in delta_rule_inputs(2, 1, 2, 4, 6, 10))
    state = torch.zeros(2, 4, 6, 10)
    for arguments, message in (
        ((q, k[:1], v, g, beta, state), "q, k"),
        ((q, k, v[:, :3], g[:, :3], beta[:, :3], state), "not a multiple"),
        ((q, k, v, g[:, :1], beta, state), "g: expected"),
        ((q, k, v, g, beta, state.mT.contiguous().mT), "contiguous"),
        ((q, k, v, g, beta, state.double()), "float32"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_delta_step(*arguments)
    with pytest.raises(ValueError, match="cannot run here"):
        gated_delta_step(q, k, v, g, beta, state, backend="triton")
