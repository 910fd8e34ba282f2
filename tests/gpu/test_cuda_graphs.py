"""CUDA graphs change no bit of a training curve."""

from importlib.util import find_spec

import pytest
import torch

from testing import gpu_graphs as graphs

pytestmark = pytest.mark.skipif(not find_spec("transformer_engine"), reason="Transformer Engine is not installed")
NEEDS_FLA = ("Kimi Delta Attention",)


@pytest.fixture(scope="session")
def on_one_gpu(tmp_path_factory):
    cases = {
        name: case for name, case in graphs.ONE_GPU.items() if name not in NEEDS_FLA or find_spec("fla") is not None
    }
    return graphs.pairs(cases, 1, tmp_path_factory.mktemp("resumed"))


@pytest.fixture(scope="session")
def on_two_gpus(tmp_path_factory):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    return graphs.pairs(graphs.TWO_GPUS, 2, tmp_path_factory.mktemp("resumed"))


def check(plain: dict, graphed: dict) -> None:
    assert plain["graphs"] == 0 and graphed["graphs"] > 0
    assert len(plain["losses"]) == graphs.STEPS and len(set(plain["losses"])) == graphs.STEPS
    assert graphed["losses"] == plain["losses"]
    assert graphed["norms"] == plain["norms"]


@pytest.mark.parametrize("name", graphs.ONE_GPU)
def test_graphs_change_no_bit(name, on_one_gpu):
    if name not in on_one_gpu:
        pytest.skip("fla is not installed")
    check(*on_one_gpu[name])


def test_a_resumed_run_changes_no_bit(on_one_gpu):
    plain, graphed = on_one_gpu[graphs.RESUMED]
    assert graphed["resumed"] == plain["losses"]
    assert graphed["same_parameters"]


@pytest.mark.parametrize("name", graphs.TWO_GPUS)
def test_graphs_change_no_bit_on_two_gpus(name, on_two_gpus):
    check(*on_two_gpus[name])
