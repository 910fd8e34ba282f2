"""Sequences in slices on several ranks, in plain torch, against whole sequences: forward and every gradient."""

import pytest
import torch

from hybrid_kernels.conv_gates import conv_gates
from hybrid_kernels.testing import HARD_CASES, delta_rule_inputs, packed_inputs
from megatron_hybrid.base.errors import UserError
from megatron_hybrid.distributed.context_parallel import with_halo
from megatron_hybrid.distributed.state_passing import explain_gated_delta_rule_of_slices, gated_delta_rule_of_slices
from tests.distributed.slice_jobs import check_conv, check_delta_rule

DIMS = dict(num_key_heads=2, num_value_heads=4, key_head_dim=6, value_head_dim=8)
TWO, FOUR = [0, 70, 130], [0, 64, 65, 100, 130]  # not multiples of a chunk; one slice of a single token


@pytest.mark.parametrize("bounds", [TWO, FOUR], ids=["2 ranks", "4 ranks"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gated_delta_rule(bounds, dtype, tolerance, ranks):
    check_delta_rule(ranks, delta_rule_inputs(2, 130, 1, 2, 8, 12, dtype=dtype, gate=-1e-2), bounds, tolerance)


@pytest.mark.parametrize("name", [name for name in HARD_CASES if "beta 1.99" in name and "gate -50" not in name])
def test_gated_delta_rule_where_it_is_hard(name, ranks):
    inputs = delta_rule_inputs(1, 96, 1, 1, 16, 16, dtype=torch.float64, **HARD_CASES[name])
    check_delta_rule(ranks, inputs, [0, 48, 96], 1e-9)


@pytest.mark.parametrize("bounds", [[0, 9, 21], [0, 3, 9, 18, 21]], ids=["2 ranks", "4 ranks"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_conv_gates(bounds, dtype, tolerance, ranks):
    check_conv(ranks, packed_inputs(21, 2, 2, 4, 6, 8, dtype=dtype), bounds, tolerance, **DIMS)


class TwoRanks:
    """Process group without communication."""

    def size(self):
        return 2

    def rank(self):
        return 0


def test_refuses_what_slices_do_not_support():
    packed = packed_inputs(4, 1, 2, 4, 6, 8)
    halo = packed[0][:3]
    with pytest.raises(ValueError, match="halo_sbw: expected"):
        conv_gates(*packed, halo_sbw=halo[:2], **DIMS)
    with pytest.raises(ValueError, match="2 tokens after a halo are fewer than the 3"):
        conv_gates(packed[0][:2], *packed[1:], halo_sbw=halo, **DIMS)
    with pytest.raises(UserError, match="2 tokens is shorter than the 3"):
        with_halo(packed[0][:2], 3, TwoRanks())
    with pytest.raises(ValueError, match="save: expected"):
        gated_delta_rule_of_slices(*delta_rule_inputs(1, 8, 1, 1, 4, 4), save="all", group=TwoRanks())


def test_the_choice_is_explained():
    rule = delta_rule_inputs(1, 8, 1, 1, 4, 4)
    choice = explain_gated_delta_rule_of_slices(*rule, group=TwoRanks())
    assert "slices on 2 ranks" in str(choice)
    assert "transition of a slice" in choice.rejected["fla"]
