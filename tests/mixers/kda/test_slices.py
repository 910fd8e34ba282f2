"""The KDA rule of sequences in slices on several ranks, in fp64, against whole sequences: forward and every gradient."""

import pytest
import torch

from hybrid_kernels.kda_rule.reference import kda_rule_recurrent
from hybrid_kernels.testing import kda_inputs, random_positions, relative_error
from megatron_hybrid.mixers.kda.slices import explain_kda_rule_of_slices
from tests.distributed.slice_jobs import drawn, results
from tests.mixers.kda import jobs

NAMES = ("o", "dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias")


@pytest.mark.parametrize("bounds", [[0, 35, 70], [0, 16, 17, 40, 70]], ids=["2 ranks", "4 ranks"])
@pytest.mark.parametrize("documents", [False, True])
def test_slices_are_the_whole(bounds, documents, ranks):
    inputs = kda_inputs(4, 70, 2, 2, 8, 12, dtype=torch.float64)
    inputs[3] = torch.randn_like(inputs[3])  # the projection of which the gate is computed
    gate = [torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (2, 16)]
    positions = random_positions(4, 70, seed=3)
    positions[:] = torch.where(positions > torch.arange(70), torch.arange(70), positions)  # none began before the row
    positions = positions if documents else None

    def whole(q, k, v, g, beta, A_log, dt_bias):
        return kda_rule_recurrent(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, positions_bs=positions)[:1]

    given = drawn([inputs[2]])
    exact = results(whole, [*inputs, *gate], given)
    job = dict(inputs=inputs, gate=gate, given=given, bounds=bounds, positions=positions)
    found = ranks.run(jobs.rule_of_slice, len(bounds) - 1, **job)
    for at, (name, oracle) in enumerate(zip(NAMES, exact, strict=True)):
        parts = [rank[at] for rank in found]
        assert relative_error(parts[0] if at > 5 else torch.cat(parts, 1), oracle) < 1e-12, name


class TwoRanks:
    """Process group without communication."""

    def size(self):
        return 2

    def rank(self):
        return 0


def test_the_choice_is_explained():
    _, k, v, _, _ = kda_inputs(1, 8, 1, 1, 4, 4)
    choice = explain_kda_rule_of_slices(k, v, group=TwoRanks(), documents=True)
    assert "slices on 2 ranks" in str(choice) and "cu_seqlens" in choice.rejected["fla"]
