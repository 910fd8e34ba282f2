"""Callbacks of section `debug`, and the comparison of replicas."""

import gzip
import json
import types

import pytest
import torch
from pydantic import ValidationError

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.debug import DebugConfig
from megatron_hybrid.train.callbacks import memory_snapshot, nvtx_ranges
from megatron_hybrid.train.callbacks.memory_snapshot import MemorySnapshot
from megatron_hybrid.train.callbacks.nvtx_ranges import NvtxRanges
from tests.train import debug_jobs
from tests.train.test_trainer import config  # noqa: F401 - config is a fixture


def test_profile_garbage_and_slowest_rank(ranks, config, tmp_path):  # noqa: F811
    config["debug"] = dict(
        profile_step_start=2, profile_step_end=3, profile_ranks=[1], manual_gc_interval=2, straggler_interval=3
    )
    results = ranks.run(debug_jobs.debugged, 2, config=config)
    for result in results:
        on, collections = zip(*result["seen"], strict=True)
        assert not any(on) and result["enabled"]
        assert [after > before for before, after in zip(collections, collections[1:], strict=False)] == [
            step % 2 == 0 for step in range(1, len(collections))
        ], "this callback comes before the collection of the same step"
    (trace,) = (tmp_path / "run" / "profiles").iterdir()
    assert trace.name == "steps-2-3-rank-00001.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"step 2", "step 3"} <= names and not {"step 1", "step 4"} & names
    assert "slowest of the last 3 steps: rank " in results[0]["printed"]


def test_a_run_that_ends_before_the_profile_writes_it(ranks, config, tmp_path):  # noqa: F811
    config["debug"] = dict(profile_step_start=2, profile_step_end=1000)
    steps = config["train"]["steps"]
    (result,) = ranks.run(debug_jobs.debugged, 1, config=config)
    (trace,) = (tmp_path / "run" / "profiles").iterdir()
    assert trace.name == f"steps-2-{steps}-rank-00000.json.gz" and "wrote " in result["printed"]


def test_replicas_that_are_equal(ranks):
    error, norms = ranks.run(debug_jobs.compared, 3, bad_rank=None)[0]
    assert error is None and norms == ["1.5"] * 4


def test_a_replica_with_one_changed_bit_is_named_on_all_ranks(ranks):
    for error, norms in ranks.run(debug_jobs.compared, 3, bad_rank=1):
        assert "different values in b (the first of 1 tensors) after step 7: rank 1 on " in error
        assert norms[:3] == ["1.5", "nan", "inf"] and "norms after the reduction: rank 1 on " in norms[3]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"profile_step_end": 3}, "3 needs profile_step_start"),
        ({"profile_step_start": 3, "profile_step_end": 2}, "2 is before profile_step_start = 3"),
    ],
)
def test_wrong_windows(fields, says):
    with pytest.raises(ValidationError, match=says):
        DebugConfig(**fields)


@pytest.mark.parametrize("callback", [NvtxRanges, MemorySnapshot])
def test_what_needs_a_gpu_says_so_before_the_first_step(callback, monkeypatch):
    for module in (memory_snapshot, nvtx_ranges):
        monkeypatch.setattr(module, "has_cuda", lambda: False)
    with pytest.raises(ConfigError, match="needs GPUs, and there are none; set it to false"):
        callback().setup(None)


def test_ranges_mark_steps(monkeypatch):
    marks, run = [], types.SimpleNamespace(progress=types.SimpleNamespace(step=4))
    monkeypatch.setattr(nvtx_ranges, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", marks.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: marks.append("end"))
    callback = NvtxRanges()
    callback.setup(run)
    callback.begin_step(run)
    callback.end_step(run, None)
    callback.close()
    assert marks == ["step 5", "end"]


def test_a_snapshot_is_written_once(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(memory_snapshot, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda file: open(file, "w").close())
    observers = []
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", observers.append, raising=False)
    launch, settings = types.SimpleNamespace(rank=3), types.SimpleNamespace(run_dir=str(tmp_path))
    callback = MemorySnapshot()
    callback.setup(types.SimpleNamespace(launch=launch, config=settings))
    observers[0](0, 1, 2, 3)
    (file,) = (tmp_path / "memory").iterdir()
    assert file.name == "rank-00003.pickle"
    file.unlink()
    observers[0](0, 1, 2, 3)
    assert not file.exists()
    callback.close()
    assert calls == [{"max_entries": 100_000}, {"enabled": None}]
