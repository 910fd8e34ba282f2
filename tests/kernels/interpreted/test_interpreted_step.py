"""gated_delta_step's Triton kernel, interpreted, against the recurrence in fp64."""

import pytest
import torch

from hybrid_kernels.gated_delta_rule.reference import gated_delta_rule_recurrent
from hybrid_kernels.gated_delta_step import gated_delta_step
from hybrid_kernels.testing import delta_rule_inputs, kda_inputs, relative_error


@pytest.mark.parametrize(("key_heads", "dims"), [(2, (96, 192)), (4, (16, 24)), (1, (20, 40))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("draw", [delta_rule_inputs, kda_inputs], ids=["a decay per head", "a decay per channel"])
def test_equals_the_recurrence(key_heads, dims, dtype, draw):
    inputs = draw(2, 4, key_heads, 4, *dims, dtype=dtype)
    start = torch.randn(2, 4, *dims)
    exact = [x.double() for x in inputs]
    expected, final = gated_delta_rule_recurrent(*exact, initial_state=start.double(), output_final_state=True)
    state = start.clone()
    o = torch.stack([gated_delta_step(*(x[:, t] for x in inputs), state, backend="triton") for t in range(4)], 1)
    assert relative_error(o, expected) < (1e-5 if dtype == torch.float32 else 4e-3)
    assert relative_error(state, final) < 1e-5
