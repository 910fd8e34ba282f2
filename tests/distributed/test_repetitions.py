"""A run gives the same bits whatever the timing of its ranks, and no memory is read or reused while it is in flight."""

import pytest
import torch
import torch.distributed as dist

from testing.exchanges import account
from testing.repetitions import difference_of_curves, difference_of_parameters, repeat, run_config


def layout(tp=1, pp=2, vpp=1, cp=1, **more) -> dict:
    return more | dict(
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        virtual_pipeline_parallel_size=vpp,
        context_parallel_size=cp,
    )


INTERLEAVED = layout(2, vpp=2)
LAYOUTS = {
    # name: (ranks, layout, tied embeddings)
    "TP2, PP2, tied": (4, layout(2), True),
    "TP2, PP2, VPP2, tied": (4, INTERLEAVED, True),
    "PP2, VPP2, exchanges waited for": (2, layout(vpp=2, overlap_p2p_comm=False), False),
    "PP4, tied": (4, layout(pp=4), True),
    "DP2, PP2, overlapped, tied": (4, layout(overlap_grad_reduce=True, overlap_param_gather=True), True),
    "CP2, PP2, VPP2": (4, layout(vpp=2, cp=2), False),
}
QUICK = ("TP2, PP2, tied", "PP2, VPP2, exchanges waited for")
CASES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in LAYOUTS]


@pytest.mark.parametrize("name", CASES)
def test_no_memory_in_flight_is_read_or_reused(name, ranks, tmp_path):
    """And the order of sends is that of the receives: a message is told from others by nothing else."""
    count, parallel, tied = LAYOUTS[name]
    results = ranks.run(account, count, config=run_config(tmp_path, parallel, tied, steps=2))
    messages = 0
    for rank, result in enumerate(results):
        assert result["violations"] == [], f"rank {rank}"
        for (group, receiver), sent in result["sent"].items():
            assert sent == results[receiver]["received"].get((group, rank)), f"rank {rank} to {receiver}"
            messages += len(sent)
    assert 2 * messages == sum(result["count"] for result in results) > 0, "as many receives as sends"


def test_memory_in_flight_that_is_reused_is_found(ranks, tmp_path):
    results = ranks.run(account, 2, config=run_config(tmp_path, layout(), steps=2), race=True)
    found = {violation for result in results for violation in result["violations"]}
    assert "an output is deallocated while its send is in flight" in found
    assert any("in flight after the step" in violation for violation in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TP2, PP2, tied", "TP2, PP2, VPP2, tied", "DP2, PP2, overlapped, tied"])
def test_every_tensor_is_the_same_whatever_the_timing(name, ranks, tmp_path):
    """benchmarks/repetitions.py is the long version."""
    count, parallel, tied = LAYOUTS[name]
    (one,) = ranks.run(repeat, 1, config=run_config(tmp_path, {}, tied, steps=2), repetitions=0, seed="")
    results = ranks.run(repeat, count, config=run_config(tmp_path, parallel, tied, steps=2), repetitions=2, seed=name)
    for result in results:
        assert result["differences"] == [] and result["tensors"] > 150
    records = [result["first"] for result in results]
    assert difference_of_curves(records, one["first"]) < 1e-6
    assert difference_of_parameters(records, one["first"]) < 1e-6


@pytest.mark.slow
def test_a_planted_race_changes_tensors(ranks, tmp_path):
    results = ranks.run(
        repeat, 4, config=run_config(tmp_path, INTERLEAVED, steps=2), repetitions=2, seed="slow", race=True
    )
    assert any(result["differences"] for result in results)


def test_evaluations_do_not_change_training(ranks, tmp_path):
    config = run_config(tmp_path, layout())
    without = config | {"train": config["train"] | {"eval_interval": None}}
    for one, other in zip(
        *(ranks.run(repeat, 2, config=each, repetitions=0, seed="") for each in (config, without)), strict=True
    ):
        one, other = one["first"], other["first"]
        assert len(one.evaluations) == 2 and not other.evaluations
        assert one.losses == other.losses and one.norms == other.norms
        for (name, _, values), (_, _, expected) in zip(one.parameters, other.parameters, strict=True):
            assert torch.equal(values, expected), name


def messages_before_the_receives() -> list[float]:
    """Twenty sends whose tensors nothing else holds, all received later."""
    if dist.get_rank() == 0:
        works = [dist.isend(torch.full((50_000,), float(number)), 1) for number in range(20)]
        dist.barrier()
    else:
        dist.barrier()
        received = [torch.zeros(50_000) for _ in range(20)]
        works = [dist.irecv(tensor, 0) for tensor in received]
    for work in reversed(works):
        work.wait()
    return [] if dist.get_rank() == 0 else [float(tensor.unique()) for tensor in received]


def test_gloo_keeps_order_and_holds_what_it_sends(ranks):
    _, received = ranks.run(messages_before_the_receives, 2)
    assert received == list(map(float, range(20)))
