"""Step times by part, and how they change with a layout."""

from dataclasses import replace

import pytest

from megatron_hybrid.arch.flops import training_flops_per_token
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.planner import network
from megatron_hybrid.planner.hardware import load
from megatron_hybrid.planner.layer_time import LayerTimes
from megatron_hybrid.planner.timing import StepPredictor
from tests.planner.test_memory import MODEL, plan

H100 = load("h100-80gb")
PREDICTOR = StepPredictor(H100)


def test_products_take_their_flops_at_the_measured_rate():
    one = PREDICTOR.step(plan(gpus=1, micro_batch=1))
    matrices = training_flops_per_token(MODEL, 1) * one.tokens
    assert matrices / one.parts["GEMMs"] == pytest.approx(1 / H100.linear["bf16"]["backward"].per_flop, rel=0.05)
    assert one.mfu == pytest.approx(training_flops_per_token(MODEL, 8192) * one.tokens / one.seconds / 989e12)


def test_replicas_share_the_batch():
    one, many = PREDICTOR.step(plan(2, gpus=2)), PREDICTOR.step(plan(2, gpus=64))
    assert many.seconds == pytest.approx(one.seconds / 32, rel=0.03)
    assert "DP communication" in many.parts and "DP communication" not in one.parts


def test_overlap_hides_the_data_parallel_communication():
    seen, hidden = (
        PREDICTOR.step(plan(gpus=64, overlap_grad_reduce=on, overlap_param_gather=on)) for on in (False, True)
    )
    assert hidden.parts["DP communication"] < 0.1 * seen.parts["DP communication"]
    total = hidden.parts["DP communication"] + hidden.hidden["DP communication, hidden"]
    assert total == pytest.approx(seen.parts["DP communication"])


def test_recomputation_costs_time_and_no_mfu_is_claimed_for_it():
    none, selective, full = (PREDICTOR.step(plan(recompute_granularity=r)) for r in ("none", "selective", "full"))
    assert none.seconds < selective.seconds < full.seconds
    assert full.parts["GEMMs"] / none.parts["GEMMs"] == pytest.approx(4 / 3, rel=0.05)
    assert none.mfu * none.seconds == pytest.approx(full.mfu * full.seconds)


def test_kept_states_save_time():
    again, kept = (PREDICTOR.step(plan(keep_delta_rule_states=on)) for on in (False, True))
    assert 0.85 < kept.parts["delta rule"] / again.parts["delta rule"] < 0.95
    assert again.seconds - kept.seconds == pytest.approx(again.parts["delta rule"] - kept.parts["delta rule"])


def test_slices_cost_exchanges_and_second_scans():
    """Eight GPUs, a sequence on one of them or on two: half the tokens at a time, twice as often."""
    whole, halves = (PREDICTOR.step(plan(gpus=8, sequence=65536, context_parallel_size=n)) for n in (1, 2))
    assert halves.parts["GEMMs"] == pytest.approx(whole.parts["GEMMs"], rel=0.01)
    assert halves.parts["attention"] == pytest.approx(whole.parts["attention"], rel=0.01)
    assert 1.3 < halves.parts["delta rule"] / whole.parts["delta rule"] < 1.75
    assert "CP communication" not in whole.parts
    # q, k, v and the output, half of them, each way, of 8 layers
    size = 8 * 2 * 4 * 3840 * 65536 / 2 / 2 * 2 * (512 / 4)
    assert halves.parts["CP communication"] > size / H100.intra_node["all_gather"].bytes_per_second


def test_playing_the_schedule_agrees_with_the_closed_form():
    for pp, vpp in ((2, 1), (4, 1), (4, 2), (8, 4)):
        one = plan(pp=pp, vpp=vpp)
        assert PREDICTOR.step(one, simulated=True).seconds == pytest.approx(PREDICTOR.step(one).seconds, rel=0.03)


def test_fp8_speeds_up_products_alone():
    fp8 = plan()
    fp8 = type(fp8)(**{**vars_of(fp8), "precision": PrecisionConfig(fp8_recipe="tensorwise")})
    bf16 = PREDICTOR.step(plan())
    assert PREDICTOR.step(fp8).parts["GEMMs"] < 0.8 * bf16.parts["GEMMs"]
    assert PREDICTOR.step(fp8).parts["delta rule"] == bf16.parts["delta rule"]


def test_launches_of_a_layer_count_the_collectives_that_are_left():
    """parallel.tp_comm_overlap moves the exchanges into the GEMMs. Scales of tensorwise FP8 are still all-reduced."""

    def host(recipe=None, **parallel) -> float:
        one = replace(plan(**parallel), precision=PrecisionConfig(fp8_recipe=recipe))
        return LayerTimes(one, PREDICTOR.hardware).host("forward") - PREDICTOR.hardware.host_seconds_per_layer

    one = PREDICTOR.hardware.host_seconds_per_collective
    assert host() == 0
    assert host(tp=4) == pytest.approx(4 * one)
    assert host("tensorwise", tp=4) == pytest.approx(6 * one)
    assert host("tensorwise", tp=4, tp_comm_overlap=True) == pytest.approx(2 * one)
    assert host(tp=4, tp_comm_overlap=True) == host("delayed", tp=4, tp_comm_overlap=True) == 0


def test_a_pre_norm_adds_the_stream_s_gradient():
    """Backward it reads one tensor more, and no addition moves three. Norms that write FP8 leave the addition to autograd."""

    def seconds(symbol: str, recipe: str | None) -> float:
        one = replace(plan(), precision=PrecisionConfig(fp8_recipe=recipe))
        return LayerTimes(one, H100)._around(one.shards[symbol], ((), ()), "backward", False)["memory-bound operations"]

    tensor = 2 * 2 * 3840 * 8192 / (H100.copy_bytes_per_second * H100.copy_efficiency["other"])  # of two sublayers
    assert seconds("G", "delayed") - seconds("G", "tensorwise") == pytest.approx(2 * tensor)
    assert seconds("A", "delayed") == seconds("A", "tensorwise"), "a post-norm reads no stream"
    assert seconds("A", None) == pytest.approx(6 * tensor)


def vars_of(one) -> dict:
    return {name: getattr(one, name) for name in one.__dataclass_fields__}


def test_a_node_s_edge_is_what_makes_groups_slow():
    inside, across = network.groups(plan(8), 8)["tp"], network.groups(plan(8), 4)["tp"]
    assert (inside.nodes, across.nodes) == (1, 2)
    size = 2**26
    assert network.seconds("all_gather", size, across, H100) > network.seconds("all_gather", size, inside, H100)
    assert network.seconds("all_gather", size, network.Group(1, 1), H100) == 0


def test_a_group_with_more_members_in_a_node_has_more_of_the_network():
    few, many = (network.seconds("reduce_scatter", 2**34, network.Group(64, n), H100) for n in (1, 8))
    assert few > 4 * many


def test_factors_scale_their_parts():
    slow = StepPredictor(H100.calibrated({"compute": 1.5, "communication": 2.0})).step(plan(2))
    fast = PREDICTOR.step(plan(2))
    assert slow.parts["GEMMs"] == pytest.approx(1.5 * fast.parts["GEMMs"])
    assert slow.parts["optimizer"] == fast.parts["optimizer"]
