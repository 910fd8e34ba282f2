"""Declarations of optimizers: their bytes, and an optimizer that only its declaration adds."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_hybrid.arch.optimizers import OPTIMIZERS
from megatron_hybrid.base.resolve import resolve
from megatron_hybrid.checkpoint.index_file import read_index
from megatron_hybrid.config.load import load_run
from megatron_hybrid.config.train import OptimizerConfig
from testing.models import SMALLEST
from tests.config.wrong_runs import TINY
from tests.train import optimizer_jobs


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_declared_states_are_those_of_torch(name):
    spec, parameter = OPTIMIZERS[name], torch.nn.Parameter(torch.ones(3, 5))
    optimizer = resolve(spec.torch_class)([parameter], lr=1e-3, **spec.torch_arguments(OptimizerConfig()))
    parameter.grad = torch.ones(3, 5)
    optimizer.step()
    states = {key: value for key, value in optimizer.state[parameter].items() if key != "step"}
    assert tuple(states) == spec.states and all(state.shape == (3, 5) for state in states.values())
    assert sum(state.nbytes for state in states.values()) == 15 * spec.state_bytes


def test_bytes_of_adamw():
    adamw = OPTIMIZERS["adamw"]
    assert (adamw.state_bytes, adamw.host_bytes, adamw.update_bytes) == (8, 16, 28)
    assert [adamw.checkpoint_bytes(size) for size in (1, 2, 4)] == [13, 14, 12]


def test_an_optimizer_that_cannot_be_sharded_is_refused(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "sgd", optimizer_jobs.SGD)
    run = load_run(None, TINY)
    sgd = run.train.model_copy(update={"optimizer": run.train.optimizer.model_copy(update={"kind": "sgd"})})
    (problem,) = run.model_copy(update={"train": sgd}).section_problems()
    assert problem[0] == "train.optimizer.kind" and "set that to false, or this to adamw" in problem[1]


ENGINES = ["megatron", *(["deepspeed"] if find_spec("deepspeed") else [])]


def test_sgd_trains_is_saved_and_resumes_after_one_declaration(ranks, tmp_path):
    """The momentum is part of checkpoints, so a resumed run is bit-identical, and both engines give the same curve."""
    curves = {}
    for engine in ENGINES:
        train = dict(steps=1, global_batch_size=4, dtype="fp32", engine=engine)
        parallel = {"distributed_optimizer": False} if engine == "megatron" else {}
        common = dict(model=SMALLEST, parallel=parallel, train=train, lr=0.3)
        straight = ranks.run(optimizer_jobs.curve_of_sgd, 2, steps=6, **common)[0]
        first = ranks.run(optimizer_jobs.curve_of_sgd, 2, steps=3, save=str(tmp_path / engine), **common)[0]
        second = ranks.run(optimizer_jobs.curve_of_sgd, 2, start=3, steps=6, load=first["path"], **common)[0]
        assert first["losses"] + second["losses"] == straight["losses"]
        for name, value in straight["parameters"].items():
            assert torch.equal(second["parameters"][name], value), name
        tensors = read_index(Path(first["path"])).tensors
        assert any(name.startswith("optimizer.momentum_buffer/") for name in tensors)
        assert not any("exp_avg" in name for name in tensors)
        curves[engine] = straight["losses"]
    assert straight["losses"][-1] < straight["losses"][0]
    for losses in curves.values():
        assert losses == pytest.approx(curves["megatron"], rel=1e-5)
