"""Every ranked layout passes the trainer's own checks, and wrong requests end without a traceback."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.load import load_run
from megatron_hybrid.planner import measure
from megatron_hybrid.planner.command import Request, answer
from megatron_hybrid.planner.emit import apply_plan, load_base_run
from megatron_hybrid.planner.hardware import load
from megatron_hybrid.planner.job import Job
from megatron_hybrid.planner.search import SearchResult, search

RUN = ["run_dir=x", "train.steps=100", "train.global_batch_size=32", "data.train=[{path: x}]"]
ASK = Request("olmo_hybrid_tiny", 8, sequence_length=64, global_batch_size=8)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.batch_ramp={start: 8, increment: 8, samples: 100}"],
        ["train.batch_ramp={start: 4, increment: 4, samples: 100}", "train.micro_batch_size=16"],
        ["precision.fp8_recipe=tensorwise", "precision.fp8_param_gather=true"],
        ["precision.fp8_recipe=blockwise"],
        ["train.optimizer.offload_fraction=0.5"],
        ["train.dtype=fp32"],
        ["model.layer_pattern=GGGAGGA"],
    ],
    ids=["ramp", "steep ramp", "fp8 parameters", "blockwise", "offload", "fp32", "uneven pipeline"],
)
def test_every_ranked_layout_is_one_that_the_trainer_takes(overrides):
    run = load_run("olmo_hybrid_tiny", [*RUN, "data.sequence_length=4096", *overrides])
    wanted = run.parallel.model_copy(update={"tp_comm_overlap": run.train.dtype == "bf16" and not run.precision.fp8})
    found = search(Job.of(run.model_copy(update={"parallel": wanted}), 8, load("h200")))
    degrees = set()
    for candidate in found.candidates:
        checked = apply_plan(run, candidate.plan)  # RunConfig, and check_world
        degrees |= {name for name in ("tp", "cp", "pp", "vpp", "dp") if getattr(candidate.plan, name) > 1}
        unit = candidate.plan.micro_batch_size * candidate.plan.dp
        assert all(checked.train.batch_size_at(at) % unit == 0 for at in (0, 30, 60, 99))
    assert {"tp", "pp", "vpp", "dp"} <= degrees, "of every kind there are some"


def layouts_of(found: SearchResult) -> set[tuple]:
    """Return the candidates without what `search` refines of the best: pipeline splits and kept states."""
    plans = [candidate.plan for candidate in found.candidates]
    return {(p.tp, p.cp, p.pp, p.vpp, p.dp, p.micro_batch_size, p.parallel.recompute_granularity) for p in plans}


def test_a_ramp_takes_layouts_away_and_says_so():
    plain = load_run("olmo_hybrid_tiny", [*RUN, "data.sequence_length=64"])
    ramped = load_run(
        "olmo_hybrid_tiny", [*RUN, "data.sequence_length=64", "train.batch_ramp={start: 2, increment: 2, samples: 40}"]
    )
    more, fewer = (search(Job.of(run, 8, load("h200"))) for run in (plain, ramped))
    assert layouts_of(fewer) < layouts_of(more)
    assert any("train.batch_ramp.start: 2 is not a multiple of" in rejection.reason for rejection in fewer.rejections)


def test_deepspeed_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: olmo_hybrid_tiny\ntrain: {engine: deepspeed, global_batch_size: 8}\ndata: {sequence_length: 64}\n"
    )
    with pytest.raises(
        ConfigError, match="train.engine: deepspeed cannot be planned: .*choose them by hand; or set train.engine"
    ):
        load_base_run(str(path), None, None, None)


RUN_ON_CPU = "{layout: a, gpus: 1, device: cpu, seconds: 1, config: {}}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpu: NVIDIA H200\nruns: []", "is a calibration of NVIDIA H200, not of NVIDIA H100 80GB HBM3"),
        (
            f"gpu: NVIDIA H100 80GB HBM3\nruns: [{RUN_ON_CPU}]",
            "a was measured on cpu, not on NVIDIA H100 80GB HBM3; remove that",
        ),
        ("gpu: NVIDIA H100 80GB HBM3\nruns: [1]", "is damaged: its runs are not what --measure writes"),
        ("gpu: NVIDIA H100 80GB HBM3\nruns: {a: 1}", "is damaged"),
        (
            "gpu: NVIDIA H100 80GB HBM3\nruns: [{layout: a, gpus: 1, seconds: 1, predicted: {}}]",
            "a does not say what was run: an earlier version measured it; remove it, and measure again",
        ),
        (
            "gpu: NVIDIA H100 80GB HBM3\nruns: [{layout: a, gpus: 1, seconds: 1, config: {train: 1}}]",
            "a: its config is not one of this version",
        ),
        ("[1]", "is a calibration of None"),
    ],
)
def test_calibrations_of_another_device(tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        answer(replace(ASK, calibration=tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("here", "gpus", "says"),
    [
        ("cpu|0", 1, "this machine has a CPU and no GPU, and the question is about NVIDIA H200"),
        ("NVIDIA H100 80GB HBM3|8", 8, "this machine has 8 x NVIDIA H100 80GB HBM3, and the question is about"),
        ("NVIDIA H200|1", 4, "this machine has 1 x NVIDIA H200, and --gpus is 4"),
        ("NVIDIA H200|8", 4, None),
    ],
)
def test_only_the_gpu_asked_about_is_measured(monkeypatch, here, gpus, says):
    class Asked:
        returncode, stdout = 0, f"a warning\n{here}\n"

    monkeypatch.setattr(measure.subprocess, "run", lambda *args, **kwargs: Asked)
    if says is None:
        measure.check_local_devices(load("h200"), gpus)
        return
    with pytest.raises(ConfigError, match=says):
        measure.check_local_devices(load("h200"), gpus)


def test_files_that_cannot_be(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "plain.yaml").write_text("model: olmo_hybrid_tiny\ntrain: 3\n")
    nowhere = tmp_path / "no" / "such.yaml"
    wrong = [dict(zip(("model",), (str(tmp_path / f"{name}.yaml"),))) for name in ("folder", "binary", "list", "plain")]
    wrong += [dict(hardware=str(tmp_path / f"{name}.yaml")) for name in ("folder", "binary", "list", "missing")]
    wrong += [
        {name: path} for name, path in itertools.product(("emit", "plot"), (nowhere, tmp_path, Path("/proc/x.png")))
    ]
    wrong += [
        dict(plot=tmp_path / "a.xyz"),
        dict(plot=tmp_path / "a"),
        dict(calibration=nowhere),
        dict(calibration=tmp_path),
    ]
    wrong += [dict(measure=1, calibration=nowhere), dict(measure=-1), dict(gpus=-8), dict(top=0), dict(gpus=10**12)]
    wrong += [dict(sequence_length=-1), dict(global_batch_size=0), dict(gpus_per_node=-1), dict(gpu="")]
    for change in wrong:
        with pytest.raises(ConfigError):
            answer(replace(ASK, **change))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binary.yaml", "folder.yaml", "list.yaml", "plain.yaml"]
