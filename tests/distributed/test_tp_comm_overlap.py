"""parallel.tp_comm_overlap without a GPU: what refuses it, and what is asked of Transformer Engine. tests/gpu runs it."""

import enum
import os
import sys
import types

import pytest

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.distributed import tp_comm_overlap as tp_overlap
from megatron_hybrid.distributed.process_groups import LONGEST_WAIT_MINUTES
from megatron_hybrid.train.engines import megatron as engine
from testing import jobs
from testing.models import SMALL

FIELD = "parallel.tp_comm_overlap"


def refusal(on_nodes: bool) -> list[tuple[str, str]]:
    """Return the error of an engine that is asked for it on CPU ranks, or, with stand-ins for its parts, on ranks of several nodes."""
    if on_nodes:
        os.environ["SLURMD_NODENAME"] = f"node{os.environ['RANK']}"
        engine.require_transformer_engine = lambda *_: None
    parallel, train = dict(tensor_parallel_size=2, tp_comm_overlap=True), dict(steps=1, global_batch_size=1)
    with pytest.raises(ConfigError) as caught:
        jobs.make_engine(SMALL, parallel, train)
    return caught.value.problems


def test_parts_that_cannot_overlap_are_an_error(ranks):
    for ((field, message),) in ranks.run(refusal, 2, on_nodes=False):
        assert field == FIELD
        assert "no CUDA device is visible; set it to false" in message


def test_ranks_on_several_nodes_are_an_error(ranks):
    for ((field, message),) in ranks.run(refusal, 2, on_nodes=True):
        assert field == FIELD
        assert "some are on node0, node1; start a multiple of parallel.tensor_parallel_size" in message


class Mode(enum.Enum):
    NONE = "none"
    FP8 = "fp8"


@pytest.mark.parametrize(
    ("precision", "modes"),
    [
        ({}, [Mode.NONE]),
        (dict(fp8_recipe="tensorwise"), [Mode.FP8]),
        (dict(fp8_recipe="tensorwise", num_layers_at_end_in_bf16=1), [Mode.FP8, Mode.NONE]),
    ],
)
def test_buffers_hold_a_micro_batch_in_the_layers_formats(precision, modes, monkeypatch):
    asked = {}

    def initialize_ub(**arguments):
        asked.update(arguments, multicast=os.environ["UB_SKIPMC"] != "1", waits=int(os.environ["UB_TIMEOUT"]))

    module = types.ModuleType("transformer_engine.pytorch.module")
    module.base = types.SimpleNamespace(initialize_ub=initialize_ub, UserBufferQuantizationMode=Mode)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(tp_overlap, "_check_one_node", lambda group: None)
    monkeypatch.setenv("UB_SKIPMC", "0")
    monkeypatch.setenv("UB_TIMEOUT", "")
    monkeypatch.delenv("UB_TIMEOUT")  # whatever is set in the test goes with it
    tp_overlap.start_overlap(PrecisionConfig(**precision), "bf16", 8192, 3840, types.SimpleNamespace(size=lambda: 2))
    assert (asked["shape"], asked["tp_size"], asked["quantization_modes"]) == ([8192, 3840], 2, modes)
    assert ("qkv_dgrad" in asked["ub_cfgs"]) == (not precision), "gradients are scattered in pieces in bf16 alone"
    assert not asked["multicast"]
    assert asked["waits"] > 60 * LONGEST_WAIT_MINUTES, (
        "else a late rank's data would be missing, and the run would go on"
    )
